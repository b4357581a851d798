"""Table 2: the hyperparameters that cross-validation chose, per task and method."""

import pandas as pd

from h2t.methods import METHODS
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import (
    MISSING,
    ReportTable,
    in_paper_order,
    integer,
    method_title,
    number,
    percent,
    task_title,
    with_backbone,
)


def section(frames: Frames) -> Section | None:
    """The table; None where nothing was chosen yet."""
    if frames.chosen.empty:
        return None
    table = hyperparameter_table(frames.chosen)
    most = integer(frames.chosen["n_candidates"].max())
    words = (
        f"Cross-validation chose among up to {most} candidates for {len(frames.chosen)} tasks and methods."
    )
    return Section(table.name, table.title, 60, words, (table,), folded=True)


def hyperparameter_table(chosen: pd.DataFrame) -> ReportTable:
    """Chosen values, without those that a method has no use for."""
    data = in_paper_order(chosen, ["backbone", "task", "method"])
    uses = data["method"].map(lambda name: METHODS[name].features if name in METHODS else "all")
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Method": data["method"].map(method_title),
            "T": data["target_size"].map(integer).mask(uses == "embedding", MISSING),
            "F": data["keep_fraction"].map(number).mask(uses != "kept", MISSING),
            "Learning rate": data["learning_rate"].map(number).mask(data["learning_rate"] == 0, MISSING),
            "Steps": data["steps"].map(integer).mask(data["steps"] == 0, MISSING),
            "Coefficient": data["coefficient"].map(number).mask(data["coefficient"].fillna(0) == 0, MISSING),
            "Validation": data["validation_accuracy"].map(percent),
            "± folds": data["validation_std"].map(percent),
            "Candidates": data["n_candidates"].map(integer),
        }
    )
    return ReportTable(
        "table2",
        "Chosen hyperparameters",
        "What cross-validation chose. T: target size of a tap's features; F: fraction of features kept; "
        "coefficient: the regularizer's; validation: mean accuracy over folds in percent, and its deviation.",
        data,
        with_backbone(data, display),
    )
