"""Our medians beside Table 1, where backbone, task and test set are the paper's."""

import math
from typing import Any

import pandas as pd

from h2t import metrics, paper
from h2t.tasks import VTAB_1K
from pipelines.report.frames import Frames, model_name
from pipelines.report.studies import Section
from pipelines.report.tables import (
    ReportTable,
    in_paper_order,
    method_title,
    percent,
    signed,
    task_title,
    with_backbone,
)

NOTE = (
    "The paper's evaluation counts a short last batch of 50 images as full. The difference is our accuracy "
    "counted that way minus the printed one; the last column is the printed one counted exactly. Only this "
    "table holds figures counted that way."
)


def section(frames: Frames) -> Section | None:
    """The table, and how far from the paper we are; None where nothing is comparable."""
    table = paper_table(frames.finished)
    if table is None:
        return None
    differences = table.data.loc[~table.data["task"].str.startswith("mean of "), "difference"]
    words = (
        f"Counted as in the paper, our accuracies differ from its own by {signed(differences.mean())} points "
        f"in the mean over {len(differences)} cells, by {percent(differences.abs().max())} at most."
    )
    return Section(table.name, table.title, 50, words, (table,), folded=True)


def paper_table(results: pd.DataFrame) -> ReportTable | None:
    """A row per backbone, method and task that is published, and the mean of each method over them."""
    n_test = results["task"].map({task.name: task.n_test for task in VTAB_1K})
    cells = results[results["n_test"] == n_test].groupby(["backbone", "method", "task"])
    rows = [row for _, cell in cells if (row := _beside_paper(cell))]
    if not rows:
        return None
    data = _with_means(in_paper_order(pd.DataFrame(rows), ["backbone", "method", "task"]))
    display = pd.DataFrame(
        {
            "Method": data["method"].map(method_title),
            "Task": data["task"].map(task_title),
            "Ours": data["test_accuracy"].map(percent),
            "Ours (paper's counting)": data["official_accuracy"].map(percent),
            "Paper": data["paper_accuracy"].map(percent),
            "± paper": data["paper_std"].map(lambda value: percent(value, 2)),
            "Difference": data["difference"].map(signed),
            "Paper (exact counting)": data["paper_corrected"].map(percent),
        }
    )
    return ReportTable("paper", "Beside the paper", NOTE, data, with_backbone(data, display))


def _beside_paper(cell: pd.DataFrame) -> dict[str, Any]:
    """The row of one backbone, method and task from those of its seeds; nothing if not published."""
    first = cell.iloc[0]
    backbone, title = model_name(first["backbone"]), task_title(first["task"])
    printed = paper.accuracies(backbone, first["method"]).get(title)
    if printed is None:
        return {}
    n_test = int(first["n_test"])
    official = cell["n_correct"].map(lambda correct: metrics.official_accuracy(correct, n_test)).median()
    return {
        **first[["backbone", "method", "task", "group"]],
        "test_accuracy": cell["test_accuracy"].median(),
        "official_accuracy": official,
        "paper_accuracy": printed / 100,
        "paper_std": paper.deviations(backbone, first["method"]).get(title, math.nan) / 100,
        "difference": official - printed / 100,
        "paper_corrected": paper.corrected(printed, n_test) / 100,
    }


def _with_means(data: pd.DataFrame) -> pd.DataFrame:
    """``data`` with the means over its tasks after each method of several, as task "mean of n tasks"."""
    parts = []
    for (backbone, method), rows in data.groupby(["backbone", "method"], sort=False):
        parts.append(rows)
        if len(rows) > 1:
            title = f"mean of {len(rows)} tasks"
            means = rows.mean(numeric_only=True).to_dict()
            parts.append(
                pd.DataFrame([{"backbone": backbone, "method": method, "task": title, "group": "", **means}])
            )
    return pd.concat(parts, ignore_index=True)
