"""Figures 7 (right), 14 and 16: more candidates, by target size and part of the taps."""

import pandas as pd

from pipelines.report.figures import PALETTE, SHAPES, ReportFigure, draw, figure_name, lines
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import GROUPS, ahead, by_backbone, task_title
from pipelines.report.trained import over_tasks, points, variant_rows, variant_table

NAME, TITLE = "scaling", "More candidates"
NOTE = (
    "Test accuracy of Head2Toe with the features of a part of the taps at each target size T, everything "
    "else by cross-validation; the taps are evenly spaced and end with the last; reference: "
    "all taps at that T."
)


def section(frames: Frames) -> Section | None:
    """Curves over the target size, one per part of the taps: by group of tasks, and task by task."""
    rows = variant_rows(frames, NAME)
    if rows.empty:
        return None
    figures = tuple(
        figure
        for backbone, part in by_backbone(rows).items()
        for figure in _figures(part, backbone, frames.backbones)
    )
    means = over_tasks(rows).groupby("series")["accuracy"].max()
    words = (
        f"With all taps Head2Toe is {ahead(means.iloc[-1] - means.iloc[0])} "
        f"{_part(means.index[0])} of them, in the mean over {rows['task'].nunique()} tasks at the "
        "best target size."
    )
    table = variant_table(NAME, TITLE, NOTE, rows, _title, "Candidates")
    return Section(NAME, TITLE, 160, words, (table,), figures, folded=True)


def _part(fraction: str) -> str:
    return {"0.0625": "a sixteenth", "0.25": "a quarter", "1": "all"}.get(fraction, fraction)


def _title(variant: str) -> str:
    fraction, _, rest = variant.partition(" ")
    return f"{_part(fraction).capitalize()} {rest}"


def _figures(rows: pd.DataFrame, backbone: str, backbones: list[str]) -> list[ReportFigure]:
    shown = {
        _part(series): (PALETTE[2 * n], SHAPES[n]) for n, series in enumerate(sorted(rows["series"].unique()))
    }
    groups = [group for group in GROUPS if group in set(rows["group"])]
    by_group = pd.concat([over_tasks(rows).assign(task="All tasks")] + [
        over_tasks(rows[rows["group"] == group]).assign(task=group.capitalize()) for group in groups
    ])  # fmt: skip
    caption = f"Test accuracy, percent, against the target size, with parts of the taps, {backbone}"
    return [
        draw(
            figure_name(name, backbone, backbones),
            f"{caption}{ending}",
            "The numbers are in the table of the same title.",
            lines(data, x="Target size", y="Accuracy", series="Taps", colours=shown, panel="Task", log=True),
            data,
        )
        for name, part, ending in ((f"{NAME}-groups", by_group, ": means over tasks."), (NAME, rows, "."))
        for data in [
            pd.DataFrame(
                {
                    "Task": part["task"].map(task_title),
                    "Taps": part["series"].map(_part),
                    "Target size": part["x"].astype(int),
                    "Accuracy": part["accuracy"].map(points),
                }
            )
        ]
    ]
