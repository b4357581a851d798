"""Figure 13: fewer training images."""

from pipelines.report.figures import method_colours
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import method_title, signed
from pipelines.report.trained import Curves, over_tasks, variant_rows, variant_table

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
    caption = "Test accuracy, percent, against the fraction of training images"
    colours = method_colours(list(dict.fromkeys(rows["series"])))
    figures = Curves(NAME, caption, "Fraction", "Method", method_title, colours).figures(frames, rows)
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
