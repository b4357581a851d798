"""How sure the accuracies are, and log loss, Brier score, calibration, balanced accuracy and macro-F1."""

import numpy as np
import pandas as pd

from pipelines.report.frames import Frames
from pipelines.report.paired import intervals
from pipelines.report.studies import Section
from pipelines.report.tables import (
    ReportTable,
    in_paper_order,
    method_title,
    percent,
    task_title,
    with_backbone,
)

MEASURES = ["test_accuracy", "balanced_accuracy", "macro_f1", "log_loss", "brier", "calibration_error"]
NOTE = (
    "Medians over seeds. The interval is that of the accuracy of another training on other test images: it "
    "covers images and seeds, both drawn at random; of a single seed images alone (Wilson). Accuracies, F1 "
    "and calibration error in percent: the last is the mean distance of confidence and accuracy over 15 bins "
    "of confidence. Log loss in nats and Brier score (0 to 2): lower is better."
)


def section(frames: Frames) -> Section | None:
    """The table; None without results."""
    data = measures(frames)
    if data.empty:
        return None
    lowest = data.loc[data.groupby(["backbone", "task"])["log_loss"].idxmin(), "method"].value_counts()
    first = method_title(lowest.index[0])
    words = f"{first} has the lowest log loss on {lowest.iloc[0]} of {lowest.sum()} tasks."
    return Section("quality", "Beside accuracy", 35, words, (_table(data),), folded=True)


def measures(frames: Frames) -> pd.DataFrame:
    """A row per backbone, task and method: medians over seeds of every measure, and ``low`` and ``high``."""
    rows = frames.finished.dropna(subset=["log_loss"])
    data = rows.groupby(["backbone", "task", "group", "method"], as_index=False)[MEASURES].median()
    known = intervals(frames.correctness)
    keys = zip(data["backbone"], data["method"], data["task"], strict=True)
    bounds = [known[key][1:3] if key in known else (np.nan, np.nan) for key in keys]
    data[["low", "high"]] = np.array(bounds, float).reshape(-1, 2)
    return in_paper_order(data, ["backbone", "task", "method"]) if len(data) else data


def _table(data: pd.DataFrame) -> ReportTable:
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Method": data["method"].map(method_title),
            "Accuracy": data["test_accuracy"].map(percent),
            "95 % interval": [
                f"{percent(low)} to {percent(high)}"
                for low, high in zip(data["low"], data["high"], strict=True)
            ],
            "Balanced": data["balanced_accuracy"].map(percent),
            "Macro-F1": data["macro_f1"].map(percent),
            "Log loss": data["log_loss"].map("{:.3f}".format),
            "Brier": data["brier"].map("{:.3f}".format),
            "Calibration error": data["calibration_error"].map(percent),
        }
    )
    return ReportTable("quality", "Beside accuracy", NOTE, data, with_backbone(data, display))
