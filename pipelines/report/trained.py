"""What the sections of studies that needed training share: their rows, and their table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipelines.report.figures import ReportFigure, draw, figure_name, intervals, lines
from pipelines.report.frames import Frames
from pipelines.report.tables import (
    MISSING,
    ReportTable,
    by_backbone,
    in_paper_order,
    percent,
    task_title,
    tasks_in_order,
    with_backbone,
)

BETTER, WORSE = "▲", "▼"
IN_TABLE = "The numbers are in the table of the same title."
MARKS = (
    f"{BETTER} and {WORSE}: better and worse than the reference by more than chance (95 % interval of the "
    "paired difference over test images and seeds)."
)
KEYS = ["backbone", "task", "group", "variant", "series", "x", "reference"]


def variant_rows(frames: Frames, study: str) -> pd.DataFrame:
    """A row per backbone, task and variant: ``accuracy`` is the median over seeds, a fraction of 1.

    Beside it the columns of ``schemas.STUDY_RESULTS`` that are the same for all seeds.
    """
    rows = frames.study_results[frames.study_results["study"] == study]
    if rows.empty:
        return rows.assign(accuracy=0.0, n_seeds=0)
    first = [
        "low",
        "high",
        "difference",
        "difference_low",
        "difference_high",
        "n_features",
        "n_kept",
        "n_train",
    ]
    grouped = rows.groupby(KEYS, sort=False, dropna=False, as_index=False)
    data = grouped.agg(
        accuracy=("test_accuracy", "median"),
        n_seeds=("seed", "nunique"),
        **{name: (name, "first") for name in first},
    )
    return in_paper_order(data.assign(method=data["series"]), ["backbone", "task", "x"]).drop(
        columns="method"
    )


def over_tasks(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean ``accuracy`` of each backbone and variant over the tasks; only variants that every task has."""
    keys = ["backbone", "variant", "series", "x"]
    n_tasks = rows.groupby("backbone")["task"].transform("nunique")
    whole = rows[rows.groupby(["backbone", "variant"])["task"].transform("nunique") == n_tasks]
    return whole.groupby(keys, sort=False, as_index=False).agg(
        accuracy=("accuracy", "mean"), n_tasks=("task", "nunique"), n_kept=("n_kept", "mean")
    )


def variant_table(
    name: str,
    title: str,
    note: str,
    rows: pd.DataFrame,
    titles: Callable[[str], str] = str,
    header: str = "Variant",
) -> ReportTable:
    """A row per variant and a column per task, with their mean where all tasks have the variant."""
    tasks = tasks_in_order(rows)
    means = over_tasks(rows).set_index(["backbone", "variant"])["accuracy"].to_dict()
    cells: list[dict[str, Any]] = []
    order = rows.drop_duplicates(["backbone", "variant"]).sort_values(
        ["backbone", "series", "x"], kind="stable"
    )
    by_key = {(r["backbone"], r["variant"], r["task"]): r for r in rows.to_dict("records")}
    for backbone, variant in zip(order["backbone"], order["variant"], strict=True):
        row = {"backbone": backbone, header: titles(variant)}
        for task in tasks:
            row[task_title(task)] = _cell(by_key.get((backbone, variant, task)))
        if len(tasks) > 1:
            mean = means.get((backbone, variant))
            row["Mean"] = MISSING if mean is None else percent(mean)
        cells.append(row)
    display = pd.DataFrame(cells)
    note = f"{note} {MARKS}" if rows["difference"].notna().any() else note
    return ReportTable(name, title, note, rows, with_backbone(display, display.drop(columns="backbone")))


def _cell(row: Mapping[Any, Any] | None) -> str:
    if row is None:
        return MISSING
    mark = f" {BETTER}" if row["difference_low"] > 0 else f" {WORSE}" if row["difference_high"] < 0 else ""
    return percent(row["accuracy"]) + mark


def points(value: float) -> float:
    """A fraction as percent with two digits, for charts."""
    return round(100 * value, 2)


@dataclass(frozen=True)
class Curves:
    """How the accuracies of a study are drawn against ``x``.

    ``name`` of the figures and ``caption``, to which the backbone is added; ``x`` and ``series``: what these
    columns are called; ``titles`` of the series; ``colours``: title -> colour and shape.
    """

    name: str
    caption: str
    x: str
    series: str
    titles: Callable[[str], str]
    colours: Mapping[str, tuple[str, str]]
    log: bool = False

    def figures(self, frames: Frames, rows: pd.DataFrame) -> tuple[ReportFigure, ...]:
        """Two for every backbone: the mean over tasks, and a panel for each task."""
        return tuple(
            figure
            for backbone, part in by_backbone(rows).items()
            for figure in (
                self._mean(part, backbone, frames),
                self.panels(self.name, part, backbone, frames),
            )
            if len(figure.data)  # no variant may be every task's
        )

    def panels(
        self, name: str, rows: pd.DataFrame, backbone: str, frames: Frames, ending: str = "."
    ) -> ReportFigure:
        """A panel for each task, or for what the column ``task`` has in the place of tasks."""
        return self._draw(name, self._data(rows), backbone, frames, ending, panel="Task")

    def _mean(self, rows: pd.DataFrame, backbone: str, frames: Frames) -> ReportFigure:
        data = self._data(over_tasks(rows).assign(task="")).drop(columns="Task")
        return self._draw(f"{self.name}-mean", data, backbone, frames, ": mean over tasks.")

    def _data(self, rows: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "Task": rows["task"].map(task_title),
                self.series: rows["series"].map(self.titles),
                self.x: rows["x"].astype(int) if (rows["x"] % 1 == 0).all() else rows["x"],
                "Accuracy": rows["accuracy"].map(points),
            }
        )

    def _draw(
        self,
        name: str,
        data: pd.DataFrame,
        backbone: str,
        frames: Frames,
        ending: str,
        panel: str | None = None,
    ) -> ReportFigure:
        chart = lines(
            data, x=self.x, y="Accuracy", series=self.series, colours=self.colours, log=self.log, panel=panel
        )
        caption = f"{self.caption}, {backbone}{ending}"
        return draw(figure_name(name, backbone, frames.backbones), caption, IN_TABLE, chart, data)


def interval_figures(
    frames: Frames, rows: pd.DataFrame, name: str, caption: str, header: str, titles: Callable[[str], str]
) -> tuple[ReportFigure, ...]:
    """For every backbone, a dot and an interval for each variant, a panel for each task."""
    figures = []
    for backbone, part in by_backbone(rows).items():
        data = pd.DataFrame(
            {
                "Task": part["task"].map(task_title),
                header: part["variant"].map(titles),
                "Accuracy": part["accuracy"].map(points),
                "Low": part["low"].map(points),
                "High": part["high"].map(points),
            }
        )
        chart = intervals(data, y=header, panel="Task")
        title = figure_name(name, backbone, frames.backbones)
        figures.append(draw(title, f"{caption}, {backbone}.", IN_TABLE, chart, data))
    return tuple(figures)
