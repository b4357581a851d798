"""The report's comparisons: Head2Toe with linear, with the paper, domain affinity, and costs."""

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pandas as pd

from h2t import metrics, paper
from h2t.costs import BackboneCost, HeadSize, finetuning_flops, storage_bytes, training_flops
from h2t.methods import METHODS
from h2t.tasks import VTAB_1K
from pipelines.report.tables import (
    MISSING,
    ReportTable,
    backbones_in_order,
    finished,
    in_paper_order,
    medians,
    method_title,
    percent,
    signed,
    task_title,
    tasks_in_order,
    with_backbone,
)


def gain_table(results: pd.DataFrame) -> ReportTable:
    """Head2Toe's gain over linear per task, in the order of domain affinity where that is known."""
    frames = [gains(results, backbone) for backbone in backbones_in_order(results)]
    data = pd.concat(frames, ignore_index=True)
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Linear": data["linear"].map(percent),
            "Head2Toe": data["head2toe"].map(percent),
            "Gain": data["gain"].map(signed),
        }
    )
    return ReportTable(
        "gain",
        "Gain of Head2Toe over linear",
        "Difference of the median test accuracies, in points of percent.",
        data,
        with_backbone(data, display),
    )


def gains(results: pd.DataFrame, backbone: str) -> pd.DataFrame:
    """Columns backbone, task, group, linear, head2toe, gain: one row per task that has both."""
    linear, head2toe = medians(results, backbone, "linear"), medians(results, backbone, "head2toe")
    affinity = metrics.domain_affinity(linear, medians(results, backbone, "scratch"))
    groups = tasks_in_order(results)
    tasks = [task for task in linear if task in head2toe]
    if all(task in affinity for task in tasks):
        tasks.sort(key=list(affinity).index)
    return pd.DataFrame(
        {
            "backbone": [backbone] * len(tasks),
            "task": tasks,
            "group": [groups[task] for task in tasks],
            "linear": [linear[task] for task in tasks],
            "head2toe": [head2toe[task] for task in tasks],
            "gain": [head2toe[task] - linear[task] for task in tasks],
        }
    ).astype({"linear": float, "head2toe": float, "gain": float})


def affinity_table(results: pd.DataFrame) -> ReportTable | None:
    """Domain affinity (section 2) and Head2Toe's gain, lowest affinity first; None without scratch."""
    rows = [row for backbone in backbones_in_order(results) for row in _affinities(results, backbone)]
    if not rows:
        return None
    data = pd.DataFrame(rows).astype(dict.fromkeys(["gain", "paper_affinity"], float))
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Linear": data["linear"].map(percent),
            "Scratch": data["scratch"].map(percent),
            "Affinity": data["affinity"].map(signed),
            "Gain of Head2Toe": data["gain"].map(signed),
            "Affinity in the paper": data["paper_affinity"].map(signed),
        }
    )
    ranks = correlations(data)
    note = (
        "Linear minus scratch, in points of percent, lowest (farthest from the source domain) first. The "
        "paper's is with ResNet-50, from its Table 1."
    )
    note = " ".join([note, *ranks, *([_printed_correlations()] if ranks else [])])
    return ReportTable("affinity", "Domain affinity", note, data, with_backbone(data, display))


def correlations(affinities: pd.DataFrame) -> list[str]:
    """Spearman's correlations as in sections 2 and 3.2 and Appendix F of the paper, a sentence each.

    The gain is Head2Toe's, where section 3.2 has that of the best single layer beside the embedding.
    """
    found = []
    columns = {str(backbone): rows.set_index("task") for backbone, rows in affinities.groupby("backbone")}
    for backbone, rows in columns.items():
        found.append((f"gain with affinity, {backbone}", rows[["affinity", "gain"]]))
        found.append((f"affinity with the paper's, {backbone}", rows[["affinity", "paper_affinity"]]))
    for first, second in combinations(columns, 2):
        pair = pd.concat(
            [columns[first]["affinity"], columns[second]["affinity"]], axis="columns", join="inner"
        )
        found.append((f"affinity of {first} with that of {second}", pair))
    ranks = [(what, pair.dropna().to_numpy(float)) for what, pair in found]
    said = [(what, metrics.spearman(*pair.T.tolist()), len(pair)) for what, pair in ranks if len(pair) >= 3]
    return [
        f"Spearman's correlation of {what}: {rank:.2f} over {n} tasks."
        for what, rank, n in said
        if not math.isnan(rank)
    ]


def _printed_correlations() -> str:
    resnet, vit = (paper.gain_correlation(backbone) for backbone in ("resnet50", "vitb16"))
    return (
        f"The paper's Table 1 gives {resnet:.2f} (ResNet-50) and {vit:.2f} (ViT-B/16) for gain with "
        f"affinity, {paper.affinity_correlation():.2f} for affinity between the two."
    )


def _affinities(results: pd.DataFrame, backbone: str) -> list[dict[str, Any]]:
    linear, scratch = medians(results, backbone, "linear"), medians(results, backbone, "scratch")
    gain = gains(results, backbone).set_index("task")["gain"].to_dict()
    printed = paper.domain_affinity("resnet50")
    return [
        {
            "backbone": backbone,
            "task": task,
            "linear": linear[task],
            "scratch": scratch[task],
            "affinity": affinity,
            "gain": gain.get(task, math.nan),
            "paper_affinity": printed.get(task_title(task), math.nan) / 100,
        }
        for task, affinity in metrics.domain_affinity(linear, scratch).items()
    ]


def paper_table(results: pd.DataFrame) -> ReportTable | None:
    """Our medians beside Table 1, where backbone, task and test set are the paper's; else None."""
    rows = finished(results)
    expected = {task.name: task.n_test for task in VTAB_1K}
    rows = rows[rows["backbone"].isin(list(paper.BACKBONES)) & (rows["n_test"] == rows["task"].map(expected))]
    cells = [cell for _, cell in rows.groupby(["backbone", "method", "task"])]
    found = [row for row in map(_beside_paper, cells) if row]
    if not found:
        return None
    data = _with_mean_rows(in_paper_order(pd.DataFrame(found), results, ["backbone", "method", "task"]))
    display = pd.DataFrame(
        {
            "Method": data["method"].map(method_title),
            "Task": data["task"].map(task_title),
            "Ours": data["test_accuracy"].map(percent),
            "Ours, their count": data["official_accuracy"].map(percent),
            "Paper": data["paper_accuracy"].map(percent),
            "± paper": data["paper_std"].map(lambda value: percent(value, 2)),
            "Difference": data["difference"].map(signed),
            "Paper, exact count": data["paper_corrected"].map(percent),
        }
    )
    note = (
        "The paper's evaluation counts a short last batch of 50 images as full. The difference is our "
        "accuracy counted that way minus the printed one; the last column is the printed one counted "
        "exactly. Only this table holds figures counted that way."
    )
    return ReportTable("paper", "Beside the paper", note, data, with_backbone(data, display))


def cost_table(results: pd.DataFrame, costs: Mapping[str, BackboneCost]) -> ReportTable:
    """Modelled (Appendix B) and measured costs per task and method, relative to fine-tuning and to linear."""
    measured = ["train_seconds", "peak_memory_bytes", "modelled_flops", "modelled_storage_bytes"]
    rows = finished(results)
    rows = modelled(rows.assign(**{name: math.nan for name in measured if name not in rows}), costs)
    keys = ["backbone", "task", "method"]
    data = rows.groupby(keys, as_index=False)[[*measured, "n_classes", "steps"]].median()
    finetuning = [_finetuning(row, costs) for row in data.to_dict("records")]
    own = pd.Series(_of_method(data, "finetune", "modelled_flops")) / _of_method(data, "finetune", "steps")
    as_many_steps = (own * data["steps"]).fillna(pd.Series([flops for flops, _ in finetuning]))
    data["flops_vs_finetuning"] = data["modelled_flops"] / as_many_steps
    data["size_vs_finetuning"] = data["modelled_storage_bytes"] / [size for _, size in finetuning]
    for name, column, method in [
        ("flops_vs_linear", "modelled_flops", "linear"),
        ("size_vs_linear", "modelled_storage_bytes", "linear"),
        ("seconds_vs_finetuning", "train_seconds", "finetune"),
    ]:
        data[name] = data[column] / _of_method(data, method, column)
    data = in_paper_order(data, results, keys)
    note = (
        "Modelled, as in Appendix B of the paper: operations of one training with the chosen hyperparameters "
        "and bytes to keep for a task; fine-tuning for as many steps, with its own batch size where it was "
        "run. Measured: the training alone, and the peak memory of its process (on a GPU, of its tensors); "
        "medians over seeds on the machine of this run."
    )
    return ReportTable("costs", "Costs", note, data, with_backbone(data, _cost_display(data)))


def modelled(rows: pd.DataFrame, costs: Mapping[str, BackboneCost]) -> pd.DataFrame:
    """Result rows with the modelled operations and bytes filled in where they are not stated."""
    rows = rows.copy()
    for place, row in rows.iterrows():
        cost = costs.get(row["backbone"])
        if cost is not None and row["method"] in METHODS:
            head = HeadSize(int(row["n_features"]), int(row["n_kept"]), int(row["n_classes"]))
            if pd.isna(row["modelled_flops"]):
                rows.at[place, "modelled_flops"] = training_flops(
                    row["method"], cost, head, int(row["steps"])
                )
            if pd.isna(row["modelled_storage_bytes"]):
                rows.at[place, "modelled_storage_bytes"] = storage_bytes(row["method"], cost, head)
    return rows


def _cost_display(data: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Method": data["method"].map(method_title),
            "FLOPs": data["modelled_flops"].map(lambda value: _scaled(value, "")),
            "of fine-tuning": data["flops_vs_finetuning"].map(_share),
            "× linear": data["flops_vs_linear"].map(_times),
            "Storage": data["modelled_storage_bytes"].map(lambda value: _scaled(value, "B")),
            "of fine-tuned": data["size_vs_finetuning"].map(_share),
            "× linear's": data["size_vs_linear"].map(_times),
            "Training": data["train_seconds"].map(_seconds),
            "of fine-tuning's": data["seconds_vs_finetuning"].map(_share),
            "Peak memory": data["peak_memory_bytes"].map(lambda value: _scaled(value, "B")),
        }
    )


def _finetuning(row: Mapping[Any, Any], costs: Mapping[str, BackboneCost]) -> tuple[float, float]:
    """Operations and bytes of fine-tuning for as many steps, in batches of the paper's size.

    NaN where the backbone's are not known.
    """
    cost = costs.get(row["backbone"])
    if cost is None:
        return math.nan, math.nan
    head = HeadSize(cost.embedding_width, cost.embedding_width, int(row["n_classes"]))
    flops = finetuning_flops(cost, head.n_features, head.n_classes, int(row["steps"]))
    return float(flops), float(storage_bytes("finetune", cost, head))


def _of_method(data: pd.DataFrame, method: str, column: str) -> list[float]:
    """For every row, the value that ``method`` has for the same backbone and task."""
    found = data[data["method"] == method].set_index(["backbone", "task"])[column].to_dict()
    return [found.get(key, math.nan) for key in zip(data["backbone"], data["task"], strict=True)]


def _with_mean_rows(data: pd.DataFrame) -> pd.DataFrame:
    """``data`` with the means over its tasks after each method of several, as task "mean of n tasks"."""
    parts = []
    for _, rows in data.groupby(["backbone", "method"], sort=False):
        means = rows.mean(numeric_only=True).to_frame().T
        named = means.assign(
            backbone=rows["backbone"].iloc[0],
            method=rows["method"].iloc[0],
            task=f"mean of {len(rows)} tasks",
        )
        parts += [rows, named[list(rows)]] if len(rows) > 1 else [rows]
    return pd.concat(parts, ignore_index=True)


def _beside_paper(rows: pd.DataFrame) -> dict[str, Any]:
    """A row of the comparison from the seeds of one backbone, method and task; nothing if not published."""
    backbone, method, task = (str(rows[name].iloc[0]) for name in ("backbone", "method", "task"))
    printed = paper.accuracies(backbone, method).get(task_title(task))
    if printed is None:
        return {}
    n_test = int(rows["n_test"].iloc[0])
    official = rows["n_correct"].map(lambda correct: metrics.official_accuracy(correct, n_test)).median()
    return {
        "backbone": backbone,
        "method": method,
        "task": task,
        "test_accuracy": rows["test_accuracy"].median(),
        "official_accuracy": official,
        "paper_accuracy": printed / 100,
        "paper_std": paper.deviations(backbone, method).get(task_title(task), math.nan) / 100,
        "difference": official - printed / 100,
        "paper_corrected": paper.corrected(printed, n_test) / 100,
    }


def _scaled(value: float, unit: str) -> str:
    """A quantity with a decimal prefix and three digits: 1.23 GB."""
    if math.isnan(value):
        return MISSING
    steps = min(int(math.log10(max(value, 1)) // 3), 6)
    return f"{value / 1000**steps:.3g} {' kMGTPE'[steps].strip()}{unit}".strip()


def _share(value: float) -> str:
    return MISSING if math.isnan(value) else f"{100 * value:.3g} %"


def _times(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.3g}"


def _seconds(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.3g} s"
