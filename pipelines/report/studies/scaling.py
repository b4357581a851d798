"""Figures 7 (right), 14 and 16: more candidates, by target size and part of the taps."""

from collections.abc import Iterator

import pandas as pd

from pipelines.report.figures import PALETTE, SHAPES, ReportFigure
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import GROUPS, ahead, by_backbone
from pipelines.report.trained import Curves, over_tasks, variant_rows, variant_table

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
    figures = tuple(_figures(frames, rows))
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


def _figures(frames: Frames, rows: pd.DataFrame) -> Iterator[ReportFigure]:
    """For every backbone, panels of groups of tasks, and of tasks."""
    series = sorted(rows["series"].unique())
    colours = {_part(name): (PALETTE[2 * n], SHAPES[n]) for n, name in enumerate(series)}
    caption = "Test accuracy, percent, against the target size, with parts of the taps"
    curves = Curves(NAME, caption, "Target size", "Taps", _part, colours, log=True)
    for backbone, part in by_backbone(rows).items():
        groups = {group.capitalize(): part[part["group"] == group] for group in GROUPS}
        means = [
            over_tasks(some).assign(task=title)
            for title, some in {"All tasks": part, **groups}.items()
            if len(some)
        ]
        yield curves.panels(
            f"{NAME}-groups", pd.concat(means), backbone, frames, ending=": means over tasks."
        )
        yield curves.panels(NAME, part, backbone, frames)
