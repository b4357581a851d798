"""Figure 11, right: accuracy with the features behind those of the highest relevance."""

import pandas as pd

from h2t import metrics
from pipelines.report.figures import PALETTE, ReportFigure, draw, figure_name, lines
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import by_backbone, percent, task_title
from pipelines.report.trained import over_tasks, points, variant_rows, variant_table

NAME, TITLE = "relevance-offset", "Features of lower relevance"
NOTE = (
    "Test accuracy of a head on consecutive features by rank of their relevance score, beginning behind as "
    "many as the offset says; everything else as cross-validation chose it for Head2Toe; reference: offset 0."
)


def section(frames: Frames) -> Section | None:
    """A curve over the offset: in the mean, and task by task."""
    rows = variant_rows(frames, NAME)
    if rows.empty:
        return None
    figures = tuple(
        figure
        for backbone, part in by_backbone(rows).items()
        for figure in _figures(part, backbone, frames.backbones)
    )
    first, last = (
        rows.loc[rows.groupby(["backbone", "task"])["x"].agg(end), "accuracy"] for end in ("idxmin", "idxmax")
    )
    ranks = [
        metrics.spearman(list(part["x"]), list(part["accuracy"]))
        for _, part in over_tasks(rows).groupby("backbone")
    ]
    words = (
        f"With {int(rows['n_kept'].max()):,} features, accuracy is {percent(first.mean())} % with those of "
        f"the highest relevance and {percent(last.mean())} % with those of the lowest, in the mean over "
        f"tasks; its rank correlation with the offset is {min(ranks):.2f} (the paper: it decreases "
        "monotonically)."
    )
    table = variant_table(NAME, TITLE, NOTE, rows, header="Features")
    return Section(NAME, TITLE, 140, words, (table,), figures, folded=True)


def _figures(rows: pd.DataFrame, backbone: str, backbones: list[str]) -> list[ReportFigure]:
    colours = {"Head2Toe": (PALETTE[0], "circle")}
    caption = f"Test accuracy, percent, of features behind the offset, {backbone}"
    shown = []
    for name, part in ((f"{NAME}-mean", over_tasks(rows).assign(task="")), (NAME, rows)):
        data = pd.DataFrame(
            {
                "Task": part["task"].map(task_title),
                "Features": "Head2Toe",
                "Offset": part["x"].astype(int),
                "Accuracy": part["accuracy"].map(points),
            }
        )
        chart = lines(
            data,
            x="Offset",
            y="Accuracy",
            series="Features",
            colours=colours,
            panel="Task" if name == NAME else None,
        )
        ending = "." if name == NAME else ": mean over tasks."
        if len(data):
            shown.append(
                draw(figure_name(name, backbone, backbones), caption + ending,
                     "The numbers are in the table of the same title.", chart, data)
            )  # fmt: skip
    return shown
