"""The section of a study whose variants are methods: how each does on every task, with its interval."""

from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import ahead, method_title
from pipelines.report.trained import interval_figures, over_tasks, variant_rows, variant_table


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
    caption = "Test accuracy, percent, with its 95 % interval over test images and seeds"
    figures = interval_figures(frames, rows, name, caption, "Method", method_title)
    table = variant_table(name, title, note, rows, method_title, "Method")
    return Section(name, title, position, words, (table,), figures, folded=True)
