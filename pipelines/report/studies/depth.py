"""Accuracy against the share of a forward pass that an adapter needs."""

from pipelines.report.figures import PALETTE, SHAPES
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.trained import Curves, over_tasks, variant_rows, variant_table

NAME, TITLE = "depth", "A forward pass that ends early"
SERIES = "within the budget"
NOTE = (
    "Test accuracy of Head2Toe on the taps that a part of a forward pass reaches, everything else by "
    "cross-validation; operations are those of products and convolutions; reference: all taps."
)


def section(frames: Frames) -> Section | None:
    """One curve per task over the share of the operations of a whole pass."""
    rows = variant_rows(frames, NAME)
    if rows.empty:
        return None
    means = over_tasks(rows).groupby("x")["accuracy"].mean().sort_index()
    words = "; ".join(f"{100 * value:.1f} % with {share:.0%} of a pass" for share, value in means.items())
    table = variant_table(NAME, TITLE, NOTE, rows, str, "Operations")
    caption = "Test accuracy, percent, against the share of a forward pass"
    colours = {SERIES: (PALETTE[0], SHAPES[0])}
    curves = Curves(NAME, caption, "Share of a forward pass", "Taps", lambda series: SERIES, colours)
    figures = curves.figures(frames, rows)
    return Section(NAME, TITLE, 165, f"Mean over tasks: {words}.", (table,), figures, folded=True)
