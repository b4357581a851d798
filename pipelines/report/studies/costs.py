"""Modelled (Appendix B) and measured costs per task and method."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from h2t.costs import BackboneCost, HeadSize, finetuning_flops, storage_bytes
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import (
    MISSING,
    ReportTable,
    in_paper_order,
    method_title,
    number,
    task_title,
    with_backbone,
)

METHOD, BASELINE, FINETUNING = "head2toe", "linear", "finetune"
NOTE = (
    "Modelled, as in Appendix B of the paper: operations of one training with the chosen hyperparameters and "
    "bytes to keep for a task; fine-tuning for as many steps, with its own batch size where it was run. "
    "Measured: the training alone, and the peak memory of its process (on a GPU, of its tensors); medians "
    "over seeds on the machine of this run."
)


def section(frames: Frames) -> Section | None:
    """The table, and Head2Toe's share of fine-tuning's costs; None without results."""
    if frames.finished.empty:
        return None
    table = cost_table(frames.finished, frames.costs)
    rows = table.data[table.data["method"] == METHOD]
    flops, size = rows["flops_vs_finetuning"].median(), rows["size_vs_finetuning"].median()
    words = (
        f"In the median over tasks, Head2Toe takes {_share(flops)} of the operations of fine-tuning for as "
        f"many steps and {_share(size)} of its storage."
    )
    return Section(
        table.name, table.title, 80, words if rows["flops_vs_finetuning"].notna().any() else "", (table,),
        folded=True,
    )  # fmt: skip


def cost_table(results: pd.DataFrame, costs: Mapping[str, BackboneCost]) -> ReportTable:
    """Medians over seeds, relative to fine-tuning for as many steps and to linear.

    ``costs``: of backbones; shares of modelled fine-tuning are NaN without.
    """
    keys = ["backbone", "task", "method"]
    columns = ["train_seconds", "peak_memory_bytes", "modelled_flops", "modelled_storage_bytes"]
    groups = results.astype(dict.fromkeys(columns, float)).groupby([*keys, "group"], as_index=False)
    data = in_paper_order(groups[[*columns, "n_classes", "steps"]].median(), keys)

    modelled = [_finetuning(row, costs) for row in data.to_dict("records")]
    run_flops, run_steps = (_of_method(data, FINETUNING, name) for name in ("modelled_flops", "steps"))
    finetuning_as_long = (run_flops / run_steps * data["steps"]).fillna(pd.Series([m[0] for m in modelled]))
    data["flops_vs_finetuning"] = data["modelled_flops"] / finetuning_as_long
    data["size_vs_finetuning"] = data["modelled_storage_bytes"] / [m[1] for m in modelled]
    for name, column, method in [
        ("flops_vs_linear", "modelled_flops", BASELINE),
        ("size_vs_linear", "modelled_storage_bytes", BASELINE),
        ("seconds_vs_finetuning", "train_seconds", FINETUNING),
    ]:
        data[name] = data[column] / _of_method(data, method, column)
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Method": data["method"].map(method_title),
            "FLOPs": data["modelled_flops"].map(_scaled),
            "of fine-tuning": data["flops_vs_finetuning"].map(_share),
            "× linear": data["flops_vs_linear"].map(lambda value: number(value, digits=3)),
            "Storage": data["modelled_storage_bytes"].map(lambda value: _scaled(value, "B")),
            "of fine-tuned": data["size_vs_finetuning"].map(_share),
            "× linear's": data["size_vs_linear"].map(lambda value: number(value, digits=3)),
            "Training": data["train_seconds"].map(lambda value: number(value, " s", 3)),
            "of fine-tuning's": data["seconds_vs_finetuning"].map(_share),
            "Peak memory": data["peak_memory_bytes"].map(lambda value: _scaled(value, "B")),
        }
    )
    return ReportTable("costs", "Costs", NOTE, data, with_backbone(data, display))


def _finetuning(row: Mapping[Any, Any], costs: Mapping[str, BackboneCost]) -> tuple[float, float]:
    """Operations and bytes of fine-tuning for as many steps, in batches of the paper's size."""
    cost = costs.get(row["backbone"])
    if cost is None:
        return math.nan, math.nan
    head = HeadSize(cost.embedding_width, cost.embedding_width, int(row["n_classes"]))
    flops = finetuning_flops(cost, head.n_features, head.n_classes, int(row["steps"]))
    return float(flops), float(storage_bytes(FINETUNING, cost, head))


def _of_method(data: pd.DataFrame, method: str, column: str) -> pd.Series:
    """For every row, the value that ``method`` has for the same backbone and task."""
    values = data[data["method"] == method].set_index(["backbone", "task"])[column].to_dict()
    keys = zip(data["backbone"], data["task"], strict=True)
    return pd.Series([values.get(key, math.nan) for key in keys], dtype=float)


def _scaled(value: float, unit: str = "") -> str:
    """A quantity with a decimal prefix and three digits: 1.23 GB."""
    if math.isnan(value):
        return MISSING
    steps = min(int(math.log10(max(value, 1)) // 3), 6)
    return f"{value / 1000**steps:.3g} {' kMGTPE'[steps].strip()}{unit}".strip()


def _share(value: float) -> str:
    return number(100 * value, " %", 3)
