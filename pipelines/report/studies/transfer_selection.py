"""Figure 7, left: features kept on one task, used for another."""

import pandas as pd

from pipelines.report.figures import ReportFigure, draw, figure_name, heat
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import by_backbone, signed, task_title
from pipelines.report.trained import IN_TABLE, points, variant_rows, variant_table

NAME, TITLE = "transfer-selection", "Features kept on another task"
NOTE = (
    "Test accuracy on the task of the column with the features that Head2Toe kept on the task of the row, "
    "seed by seed, with the column's own rate and steps; reference: its own features."
)


def section(frames: Frames) -> Section | None:
    """The table, and a heat map of the differences."""
    rows = variant_rows(frames, NAME)
    if rows["task"].nunique() < 2:
        return None
    figures = tuple(_figure(part, backbone, frames.backbones) for backbone, part in by_backbone(rows).items())
    others = rows[rows["variant"] != rows["task"]]
    own = int((others.groupby(["backbone", "task"])["difference"].max() <= 0).sum())
    words = (
        f"With the features of another task, accuracy changes by {signed(others['difference'].mean())} "
        f"points on average; on {own} of {others.groupby(['backbone', 'task']).ngroups} tasks no other's "
        "features are better."
    )
    table = variant_table(NAME, TITLE, NOTE, rows, task_title, "Kept on")
    return Section(NAME, TITLE, 150, words, (table,), figures, folded=True)


def _figure(rows: pd.DataFrame, backbone: str, backbones: list[str]) -> ReportFigure:
    data = pd.DataFrame(
        {
            "Kept on": rows["variant"].map(task_title),
            "Used for": rows["task"].map(task_title),
            "Difference": rows["difference"].fillna(0.0).map(points),
            "Accuracy": rows["accuracy"].map(points),
        }
    )
    return draw(
        figure_name(NAME, backbone, backbones),
        "Change of the test accuracy, points of percent, with features that were kept on another "
        f"task, {backbone}.",
        IN_TABLE,
        heat(data, row="Kept on", column="Used for", value="Difference", diverging=True, cell=48),
        data,
    )
