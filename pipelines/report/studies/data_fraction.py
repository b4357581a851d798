"""Figure 13: fewer training images."""

import pandas as pd

from pipelines.report.figures import ReportFigure, draw, figure_name, lines, method_colours
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import by_backbone, method_title, signed, task_title
from pipelines.report.trained import over_tasks, points, variant_rows, variant_table

NAME, TITLE = "data-fraction", "Fewer training images"
NOTE = (
    "Test accuracy with a fraction of the training images, equally many of each class (at least one), chosen "
    "by cross-validation among these; smaller parts lie in larger ones; reference: all images."
)


def section(frames: Frames) -> Section | None:
    """Curves over the fraction: in the mean, and task by task."""
    rows = variant_rows(frames, NAME)
    if rows.empty:
        return None
    figures = tuple(
        figure
        for backbone, part in by_backbone(rows).items()
        for figure in _figures(part, backbone, frames.backbones)
    )
    means = over_tasks(rows).pivot_table(index="x", columns="series", values="accuracy")
    leads = means["head2toe"] - means["linear"]
    words = (
        f"Head2Toe leads linear by {signed(leads.iloc[0])} points with a fraction of {leads.index[0]:g} of "
        f"the images and by {signed(leads.iloc[-1])} with all of them, in the mean over "
        f"{rows['task'].nunique()} tasks."
    )
    table = variant_table(NAME, TITLE, NOTE, rows, _title, "Method and fraction")
    return Section(NAME, TITLE, 170, words, (table,), figures, folded=True)


def _title(variant: str) -> str:
    method, _, fraction = variant.partition(" ")
    return f"{method_title(method)}, {fraction}"


def _figures(rows: pd.DataFrame, backbone: str, backbones: list[str]) -> list[ReportFigure]:
    colours = method_colours(list(dict.fromkeys(rows["series"])))
    shown = []
    for name, part in ((f"{NAME}-mean", over_tasks(rows).assign(task="All tasks")), (NAME, rows)):
        data = pd.DataFrame(
            {
                "Task": part["task"].map(task_title),
                "Method": part["series"].map(method_title),
                "Fraction": part["x"],
                "Accuracy": part["accuracy"].map(points),
            }
        )
        panel = "Task" if name == NAME else None
        shown.append(
            draw(
                figure_name(name, backbone, backbones),
                f"Test accuracy, percent, against the fraction of training images, {backbone}"
                + ("." if panel else ": mean over tasks."),
                "The numbers are in the table of the same title.",
                lines(data, x="Fraction", y="Accuracy", series="Method", colours=colours, panel=panel),
                data,
            )
        )
    return shown
