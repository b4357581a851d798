"""Figure 11, right: accuracy with the features behind those of the highest relevance."""

from h2t import metrics
from pipelines.report.figures import PALETTE
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import percent
from pipelines.report.trained import Curves, over_tasks, variant_rows, variant_table

NAME, TITLE, METHOD = "relevance-offset", "Features of lower relevance", "Head2Toe"
NOTE = (
    "Test accuracy of a head on consecutive features by rank of their relevance score, beginning behind as "
    "many as the offset says; everything else as cross-validation chose it for Head2Toe; reference: offset 0."
)


def section(frames: Frames) -> Section | None:
    """A curve over the offset: in the mean, and task by task."""
    rows = variant_rows(frames, NAME)
    if rows.empty:
        return None
    caption = "Test accuracy, percent, of features behind the offset"
    colours = {METHOD: (PALETTE[0], "circle")}
    figures = Curves(NAME, caption, "Offset", "Features", lambda series: METHOD, colours).figures(
        frames, rows
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
