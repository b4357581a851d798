"""Figures 6 (left) and 10: features kept one by one against taps kept whole, equally many of them."""

from pipelines.report.figures import method_colours
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import ahead, method_title
from pipelines.report.trained import Curves, over_tasks, variant_rows, variant_table

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
    caption = "Test accuracy, percent, against the number of features kept"
    colours = method_colours(list(dict.fromkeys(rows["series"])))
    figures = Curves(NAME, caption, "Kept", "Method", method_title, colours, log=True).figures(frames, rows)
    best = over_tasks(rows).groupby("series")["accuracy"].max()
    first, others = best.get("head2toe"), best.drop("head2toe", errors="ignore")
    words = (
        f"At its best number of features, keeping them one by one is "
        f"{ahead(first - others.max())} keeping taps whole, in the mean over {rows['task'].nunique()} tasks."
    )
    table = variant_table(NAME, TITLE, NOTE, rows, _title, "Kept")
    return Section(NAME, TITLE, 120, words, (table,), figures, folded=True)


def _title(variant: str) -> str:
    method, _, fraction = variant.partition(" ")
    return f"{method_title(method)}, F = {fraction}"
