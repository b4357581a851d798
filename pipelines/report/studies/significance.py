"""Whether the method of highest mean differs from the others by more than chance."""

import numpy as np
import pandas as pd

from h2t.statistics import average_ranks, holm, mcnemar, median_seed, paired_difference, wilcoxon
from pipelines.report.frames import Frames
from pipelines.report.paired import Correctness
from pipelines.report.studies import Section
from pipelines.report.tables import (
    MISSING,
    ReportTable,
    in_paper_order,
    medians,
    method_title,
    methods_in_order,
    number,
    percent,
    signed,
    task_title,
    tasks_in_order,
    with_backbone,
)

PREFERRED = "head2toe"
BY_TASK_NOTE = (
    "Accuracy of the reference minus that of the method on the same test images, in points of percent, with "
    "the 95 % interval that covers test images and seeds; p of an exact McNemar test of the two trainings of "
    "median accuracy."
)
OVER_TASKS_NOTE = (
    "Median accuracies over all tasks that every method has. Average rank: 1 is the best. p: Wilcoxon's "
    "signed-rank test against the reference, with Holm's correction for the number of methods; with fewer "
    "than six tasks it cannot fall below 0.05."
)


def section(frames: Frames) -> Section | None:
    """Differences per task and over tasks; None without two methods on the same test images."""
    found = frames.correctness
    by_task = differences(found, frames.finished)
    if by_task.empty:
        return None
    over = over_tasks(frames.finished)
    clear = int((by_task["low"] > 0).sum() + (by_task["high"] < 0).sum())
    reference = method_title(by_task["reference"].iloc[0])
    words = (
        f"{reference} differs from the other methods by more than chance in {clear} of {len(by_task)} "
        f"comparisons, and is better in {int((by_task['low'] > 0).sum())} of these."
    )
    tables = (_over_tasks_table(over), _by_task_table(by_task))
    return Section("significance", "More than chance?", 25, words, tables, folded=True)


def reference_of(results: pd.DataFrame, backbone: str) -> str:
    """What the others are compared with: Head2Toe, or else the method of highest mean."""
    rows = results[results["backbone"] == backbone]
    methods = methods_in_order(rows)
    means = {method: np.mean(list(medians(rows, backbone, method).values())) for method in methods}
    return PREFERRED if PREFERRED in means else max(means, key=lambda method: means[method])


def differences(found: Correctness, results: pd.DataFrame) -> pd.DataFrame:
    """A row per backbone, task and method beside the reference."""
    groups, rows = tasks_in_order(results), []
    for (backbone, task), methods in found.items():
        if task not in groups:
            continue
        reference = reference_of(results, backbone)
        for method in methods if reference in methods else ():
            if method != reference:
                estimate = paired_difference(methods[reference], methods[method])
                p_value = mcnemar(median_seed(methods[reference]), median_seed(methods[method]))
                rows.append((backbone, task, groups[task], method, reference, *estimate[:3], p_value))
    columns = ["backbone", "task", "group", "method", "reference", "difference", "low", "high", "p_mcnemar"]
    data = pd.DataFrame(rows, columns=columns)
    return in_paper_order(data, ["backbone", "task", "method"]) if rows else data


def over_tasks(results: pd.DataFrame) -> pd.DataFrame:
    """A row per backbone and method: mean difference, Wilcoxon's test and average rank over tasks."""
    rows = []
    for backbone in sorted(results["backbone"].unique()):
        reference = reference_of(results, backbone)
        values = {
            method: medians(results, backbone, method)
            for method in methods_in_order(results[results["backbone"] == backbone])
        }
        most = max(map(len, values.values()))
        complete = {method: scores for method, scores in values.items() if len(scores) == most}
        if reference not in complete:
            continue
        tasks = list(complete[reference])
        ranks = average_ranks(np.array([[scores[task] for scores in complete.values()] for task in tasks]))
        gains = {
            method: [complete[reference][task] - scores[task] for task in tasks]
            for method, scores in complete.items()
            if method != reference
        }
        corrected = holm({method: wilcoxon(gain) for method, gain in gains.items()})
        for (method, scores), rank in zip(complete.items(), ranks, strict=True):
            difference = float(np.mean(gains[method])) if method in gains else 0.0
            mean = float(np.mean(list(scores.values())))
            rows.append(
                (
                    backbone,
                    method,
                    reference,
                    len(tasks),
                    mean,
                    rank,
                    difference,
                    corrected.get(method, np.nan),
                )
            )
    columns = [
        "backbone",
        "method",
        "reference",
        "n_tasks",
        "mean",
        "average_rank",
        "difference",
        "p_wilcoxon",
    ]
    return pd.DataFrame(rows, columns=columns)


def _by_task_table(data: pd.DataFrame) -> ReportTable:
    interval = [
        f"{signed(low)} to {signed(high)}" for low, high in zip(data["low"], data["high"], strict=True)
    ]
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Reference": data["reference"].map(method_title),
            "Method": data["method"].map(method_title),
            "Difference": data["difference"].map(signed),
            "95 % interval": interval,
            "p (McNemar)": data["p_mcnemar"].map(p_text),
        }
    )
    return ReportTable("differences", "Differences by task", BY_TASK_NOTE, data, with_backbone(data, display))


def _over_tasks_table(data: pd.DataFrame) -> ReportTable:
    display = pd.DataFrame(
        {
            "Method": data["method"].map(method_title),
            "Tasks": data["n_tasks"].map(number),
            "Mean": data["mean"].map(percent),
            "Average rank": data["average_rank"].map(lambda rank: f"{rank:.2f}"),
            "Reference's lead": data["difference"].map(signed),
            "p (Wilcoxon, Holm)": data["p_wilcoxon"].map(p_text),
        }
    )
    return ReportTable("ranks", "Over tasks", OVER_TASKS_NOTE, data, with_backbone(data, display))


def p_text(value: float) -> str:
    """A p-value with three digits after the point; an en dash for NaN."""
    return MISSING if np.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
