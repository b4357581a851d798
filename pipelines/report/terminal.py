"""The main table on a terminal."""

import math
import re
from itertools import pairwise

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from h2t.metrics import Summary
from pipelines.report.studies.accuracy import accuracy_table
from pipelines.report.tables import (
    backbones_in_order,
    method_title,
    percent,
    summaries,
    task_title,
    tasks_in_order,
)

NAME_WIDTH = 18
SYLLABLE = re.compile(r"(?<=-)(?=\w)|(?<=2)(?=T)")  # where a method's title may break
WIDE_COLUMN = 14  # "62.4 ± 0.3" and what rich sets between columns


def print_table(results: pd.DataFrame, console: Console) -> None:
    """Print the median accuracies over seeds, in percent: tasks down, methods across."""
    if results.empty:
        console.print("No results yet.")
    for backbone in backbones_in_order(results):
        console.print(terminal_table(results[results["backbone"] == backbone], console.width))


def terminal_table(results: pd.DataFrame, width: int) -> Table:
    """The table of one backbone, with deviations over seeds where ``width`` columns have room for them."""
    source, groups = accuracy_table(results), tasks_in_order(results)
    spreads = {(method, task): summary for (_, method, task), summary in summaries(results).items()}
    counts = {summary.n for summary in spreads.values()}
    methods = list(source.data["method"])
    wide = max(counts) > 1 and NAME_WIDTH + WIDE_COLUMN * len(methods) <= width
    table = _empty_table([method_title(method) for method in methods], width, wide)
    several = " to ".join(map(str, sorted({min(counts), max(counts)})))
    seeds = f"median of {several} seeds" if max(counts) > 1 else "one seed"
    table.title = (
        f"Test accuracy in percent: {results['backbone'].iloc[0]}, {seeds}"
        f"{' ± standard deviation' if wide else ''}"
    )
    values = source.data.drop(columns=["backbone", "method"])
    names = [str(name) for name in values]
    for column, (name, following) in enumerate(pairwise([*names, ""]), start=1):
        cells = [
            _cell(value, spreads.get((method, name)), (row, column) in source.bold, wide)
            for row, (method, value) in enumerate(zip(methods, values[name], strict=True))
        ]
        title = task_title(name) if name in groups else f"[italic]mean, {name.removeprefix('mean_')}[/]"
        table.add_row(title, *cells, end_section=not following or groups.get(name) != groups.get(following))
    return table


def _empty_table(titles: list[str], width: int, wide: bool) -> Table:
    tight = not wide and NAME_WIDTH + sum(len(title) + 3 for title in titles) > width
    table = Table(title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 0 if tight else 1)
    table.add_column("", no_wrap=True)
    for title in titles:
        table.add_column(
            SYLLABLE.sub("\n", title) if tight else title, justify="right", min_width=5, overflow="fold"
        )
    return table


def _cell(value: float, spread: Summary | None, best: bool, wide: bool) -> str:
    """A value, with its deviation or as much room where the table is wide."""
    shown = f"[bold green]{percent(value)}[/]" if best else percent(value)
    if not wide or spread is None or math.isnan(spread.std):
        return shown + " " * 6 * wide
    return f"{shown} [dim]± {percent(spread.std)}[/]"
