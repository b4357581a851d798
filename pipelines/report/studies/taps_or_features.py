"""Figures 6 (left) and 10: features kept one by one against taps kept whole, equally many of them."""

from typing import Any

import pandas as pd

from pipelines.report.figures import ReportFigure, draw, figure_name, lines, method_colours
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import ahead, by_backbone, method_title, task_title
from pipelines.report.trained import over_tasks, points, variant_rows, variant_table

NAME, TITLE = "taps-or-features", "Features or taps?"
NOTE = (
    "Test accuracy with equally many features kept: one by one by their relevance (Head2Toe), or tap by tap "
    "by the mean relevance or the norm of a tap's weights; rate, steps and coefficient by cross-validation; "
    "reference: Head2Toe with as many features. The norm's penalty has its coefficient, which the official "
    "code forgets."
)


def section(frames: Frames) -> Section | None:
    """Curves over the number of features kept: in the mean, and task by task."""
    rows = variant_rows(frames, NAME)
    if rows.empty:
        return None
    figures = [
        figure
        for backbone, part in by_backbone(rows).items()
        for figure in _figures(part, backbone, frames.backbones)
    ]
    best = over_tasks(rows).groupby("series")["accuracy"].max()
    first, others = best.get("head2toe"), best.drop("head2toe", errors="ignore")
    words = (
        f"At its best number of features, keeping them one by one is "
        f"{ahead(first - others.max())} keeping taps whole, in the mean over {rows['task'].nunique()} tasks."
    )
    table = variant_table(NAME, TITLE, NOTE, rows, _title, "Kept")
    return Section(NAME, TITLE, 120, words, (table,), tuple(figures), folded=True)


def _title(variant: str) -> str:
    method, _, fraction = variant.partition(" ")
    return f"{method_title(method)}, F = {fraction}"


def _figures(rows: pd.DataFrame, backbone: str, backbones: list[str]) -> list[ReportFigure]:
    colours = method_colours(list(dict.fromkeys(rows["series"])))
    means = _data(over_tasks(rows).assign(task=""))
    tasks = _data(rows)
    options: dict[str, Any] = {
        "x": "Kept",
        "y": "Accuracy",
        "series": "Method",
        "colours": colours,
        "log": True,
    }
    caption = f"Test accuracy, percent, against the number of features kept, {backbone}"
    return [
        draw(figure_name(f"{NAME}-mean", backbone, backbones), f"{caption}: mean over tasks.",
             "The numbers are in the table of the same title.",
             lines(means.drop(columns="Task"), **options), means.drop(columns="Task")),
        draw(figure_name(NAME, backbone, backbones), f"{caption}.",
             "The numbers are in the table of the same title.", lines(tasks, panel="Task", **options), tasks),
    ]  # fmt: skip


def _data(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "Task": rows["task"].map(task_title),
            "Method": rows["series"].map(method_title),
            "Kept": rows["x"].astype(int),
            "Accuracy": rows["accuracy"].map(points),
        }
    )
