"""Several runs beside one another: paired differences on the same test images, and a table of all runs."""

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pandas as pd
from pyarrow.fs import FileSelector

from h2t.errors import UserError
from h2t.statistics import paired_difference
from pipelines.report.frames import Frames, read_runs
from pipelines.report.tables import (
    ReportTable,
    in_paper_order,
    method_title,
    number,
    percent,
    signed,
    statistics,
    task_title,
)
from pipelines.run_directory import RunDirectory, open_filesystem
from pipelines.run_record import RECORD, read_record

NOTE = (
    "Accuracies: medians over seeds, in percent. Difference: mean accuracy minus that of the first run on "
    "the same test images, in points of percent, with the 95 % interval that covers test images and seeds; "
    "it exceeds chance where the interval leaves zero out."
)


def compare(runs: Sequence[RunDirectory]) -> ReportTable:
    """Every task and method that the first and another run (or backbone) share.

    Raises UserError for runs without predictions in common, and for a task whose test images differ, with
    what differs.
    """
    frames = read_runs(runs)
    entries = list(dict.fromkeys(frames.predictions["backbone"]))
    if len(entries) < 2:
        raise UserError(
            "expected predictions of two runs or backbones and more, got "
            f"{', '.join(entries) or 'none'}: run the evaluate stage of each first"
        )
    rows = [row for entry in entries[1:] for row in _differences(frames, entries[0], entry)]
    if not rows:
        raise UserError(f"{', '.join(entries)} have no task and method in common")
    data = in_paper_order(pd.DataFrame(rows), ["backbone", "task", "method"])
    display = pd.DataFrame(
        {
            "Run": data["backbone"],
            "Task": data["task"].map(task_title),
            "Method": data["method"].map(method_title),
            entries[0]: data["reference_accuracy"].map(percent),
            "Accuracy": data["test_accuracy"].map(percent),
            "Difference": data["difference"].map(signed),
            "95 % interval": [
                f"{signed(low)} to {signed(high)}"
                for low, high in zip(data["low"], data["high"], strict=True)
            ],
            "Exceeds chance": np.where((data["low"] > 0) | (data["high"] < 0), "yes", "no"),
        }
    )
    return ReportTable("comparison", f"Compared with {entries[0]}", NOTE, data, display)


def _differences(frames: Frames, reference: str, entry: str) -> list[dict[str, object]]:
    found, results = frames.correctness, frames.finished
    medians = results.groupby(["backbone", "task", "method"])["test_accuracy"].median()
    groups = dict(zip(results["task"], results["group"], strict=True))
    rows: list[dict[str, object]] = []
    for task in [task for backbone, task in found if backbone == reference and (entry, task) in found]:
        _check_same_images(frames.predictions, reference, entry, task)
        first, other = found[reference, task], found[entry, task]
        for method in [method for method in first if method in other]:
            estimate = paired_difference(other[method], first[method])
            rows.append(
                {
                    "backbone": entry, "task": task, "group": groups.get(task, "other"), "method": method,
                    "reference": reference,
                    "reference_accuracy": medians.get((reference, task, method), np.nan),
                    "test_accuracy": medians.get((entry, task, method), np.nan),
                    "difference": estimate.mean, "low": estimate.low, "high": estimate.high,
                }
            )  # fmt: skip
    return rows


def _check_same_images(predictions: pd.DataFrame, reference: str, entry: str, task: str) -> None:
    """Raise UserError unless both have predictions for test images of the same indices and labels."""
    of_task = predictions[predictions["task"] == task]
    first, other = (
        of_task[of_task["backbone"] == name].drop_duplicates("index").set_index("index")["label"].sort_index()
        for name in (reference, entry)
    )
    if not first.index.equals(other.index):
        raise UserError(
            f"{task}: {reference} was tested on {len(first)} images and {entry} on {len(other)}, which are "
            "not the same rows; compare runs with the same test images"
        )
    if not first.equals(other):
        n_other = int((first != other).sum())
        raise UserError(
            f"{task}: {n_other} of {len(first)} test images have other labels in {entry} than in "
            f"{reference}; compare runs with the same test images"
        )


def leaderboard(folder: str) -> ReportTable:
    """A row per run, backbone and method of all run directories under a folder, the best mean first.

    Raises UserError where there are none.
    """
    filesystem, root = open_filesystem(folder)
    infos = filesystem.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    records = [info for info in infos if info.base_name == RECORD and "/history/" not in info.path]
    rows: list[dict[str, object]] = []
    for info in sorted(records, key=lambda info: info.path):
        name = info.path[len(root) :].strip("/").removesuffix(RECORD).strip("/")
        run = RunDirectory(folder).subdirectory(name) if name else RunDirectory(folder)
        record, results = read_record(run), read_runs([run]).finished
        if results.empty:
            continue
        when = (info.mtime or datetime.now(UTC)).astimezone(UTC)
        for row in statistics(results, "median").to_dict("records"):
            rows.append(
                {
                    "run": name or run.uri, "recipe": record["config"]["name"], "backbone": row["backbone"],
                    "method": row["method"], "n_tasks": results["task"].nunique(),
                    "mean_accuracy": row["mean_all"], "fingerprint": record["fingerprint"],
                    "date": when.date().isoformat(),
                }
            )  # fmt: skip
    if not rows:
        raise UserError(f"no run with results under {folder}: expected folders with a {RECORD}")
    data = pd.DataFrame(rows).sort_values(
        ["mean_accuracy", "run"], ascending=[False, True], ignore_index=True
    )
    display = pd.DataFrame(
        {
            "Run": data["run"],
            "Recipe": data["recipe"],
            "Backbone": data["backbone"],
            "Method": data["method"].map(method_title),
            "Tasks": data["n_tasks"].map(number),
            "Mean accuracy": data["mean_accuracy"].map(percent),
            "Fingerprint": data["fingerprint"],
            "Date": data["date"],
        }
    )
    note = (
        "Mean over tasks of the median test accuracies over seeds, in percent; an en dash where a task lacks."
    )
    return ReportTable("leaderboard", "All runs", note, data, display)
