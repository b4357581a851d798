"""The section of a study whose variants are methods: how each does on every task, with its interval."""

import pandas as pd

from pipelines.report.figures import draw, figure_name, intervals
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import ahead, by_backbone, method_title, task_title
from pipelines.report.trained import over_tasks, points, variant_rows, variant_table


def section_of_methods(frames: Frames, name: str, title: str, position: int, note: str) -> Section | None:
    """Table and dots with intervals; the first variant is the reference."""
    rows = variant_rows(frames, name)
    if rows.empty:
        return None
    means = over_tasks(rows).groupby("series", sort=False)["accuracy"].mean()
    reference = str(rows["series"].iloc[int(rows["x"].argmin())])
    others = means.drop(reference)
    n_tasks = rows["task"].nunique()
    words = (
        f"In the mean over {n_tasks} task{'s' if n_tasks > 1 else ''}, {method_title(reference)} is "
        f"{ahead(means[reference] - others.max())} the best other, "
        f"{method_title(str(others.idxmax()))}."
    )
    figures = []
    for backbone, part in by_backbone(rows).items():
        data = pd.DataFrame(
            {
                "Task": part["task"].map(task_title),
                "Method": part["series"].map(method_title),
                "Accuracy": part["accuracy"].map(points),
                "Low": part["low"].map(points),
                "High": part["high"].map(points),
            }
        )
        figures.append(
            draw(
                figure_name(name, backbone, frames.backbones),
                f"Test accuracy, percent, with its 95 % interval over test images and seeds, {backbone}.",
                "The numbers are in the table of the same title.",
                intervals(data, y="Method", panel="Task"),
                data,
            )
        )
    table = variant_table(name, title, note, rows, method_title, "Method")
    return Section(name, title, position, words, (table,), tuple(figures), folded=True)
