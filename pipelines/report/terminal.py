"""The main table on a terminal."""

import math
import re
from collections.abc import Mapping

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from h2t.metrics import Summary
from pipelines.report.tables import (
    accuracy_table,
    backbones_in_order,
    finished,
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
    rows = finished(results) if len(results) else results
    if rows.empty:
        console.print("No results yet.")
        return
    for backbone in backbones_in_order(rows):
        console.print(terminal_table(rows[rows["backbone"] == backbone], console.width))


def terminal_table(results: pd.DataFrame, width: int) -> Table:
    """The table of one backbone, with deviations over seeds where ``width`` columns have room for them."""
    source = accuracy_table(results)
    spreads = {(method, task): found for (_, method, task), found in summaries(results).items()}
    counts = {found.n for found in spreads.values()}
    methods = list(source.data["method"])
    wide = max(counts) > 1 and NAME_WIDTH + WIDE_COLUMN * len(methods) <= width
    table = _empty_table([method_title(method) for method in methods], width, wide)
    table.title = _title(str(results["backbone"].iloc[0]), counts, wide)
    groups = tasks_in_order(results)
    values = source.data.drop(columns=["backbone", "method"])
    names = [str(name) for name in values]
    for place, name in enumerate(names):
        best = [(row, place + 1) in source.bold for row in range(len(methods))]
        found = [spreads.get((method, name)) if wide else None for method in methods]
        cells = [_cell(*each, wide) for each in zip(values[name], found, best, strict=True)]
        last = place + 1 == len(names) or groups.get(name) != groups.get(names[place + 1])
        table.add_row(_row_title(name, groups), *cells, end_section=last)
    return table


def _empty_table(titles: list[str], width: int, wide: bool) -> Table:
    tight = not wide and NAME_WIDTH + sum(len(title) + 3 for title in titles) > width
    table = Table(title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 0 if tight else 1)
    table.add_column("", no_wrap=True)
    for title in titles:
        table.add_column(SYLLABLE.sub("\n", title) if tight else title, justify="right", min_width=5)
    return table


def _title(backbone: str, counts: set[int], wide: bool) -> str:
    several = " to ".join(map(str, sorted({min(counts), max(counts)})))
    seeds = f"median of {several} seeds" if max(counts) > 1 else "one seed"
    return f"Test accuracy in percent: {backbone}, {seeds}{' ± standard deviation' if wide else ''}"


def _cell(value: float, spread: Summary | None, best: bool, wide: bool) -> str:
    """A value, with its deviation or as much room where the table is wide."""
    shown = f"[bold green]{percent(value)}[/]" if best else percent(value)
    if spread is None or math.isnan(spread.std):
        return shown + " " * 6 * wide
    return f"{shown} [dim]± {percent(spread.std)}[/]"


def _row_title(name: str, groups: Mapping[str, str]) -> str:
    if name in groups:
        return task_title(name)
    return f"[italic]mean, {name.removeprefix('mean_')}[/]"
