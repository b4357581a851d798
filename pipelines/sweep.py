"""Stage 2, Ray Tune: cross-validation of every method on frozen features, and the choice it makes."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import ray
import torch
from rich.console import Console

from h2t.features import select as select_features
from h2t.head2toe import Head, fit
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from h2t.metrics import accuracy, cross_entropy
from pipelines.cluster import Cluster, concurrent_trials, slots, trial_resources
from pipelines.config import Config
from pipelines.feature_cache import FeatureCache, cached_features
from pipelines.feature_files import FeatureMatrix
from pipelines.jobs import run_trials
from pipelines.progress import StageProgress
from pipelines.run_directory import RunDirectory
from pipelines.task_data import TaskData, Trial, backbone_folder

PACKS_PER_SLOT = 4
SETTINGS = ["method", "target_size", "learning_rate", "steps", "coefficient", "keep_fraction"]


def sweep(
    config: Config, works: Sequence[TaskData], run: RunDirectory, cluster: Cluster, console: Console
) -> int:
    """Run the trials that are missing and write the settings they select; how many trials ran."""
    missing, stale = [], 0
    for work in works:
        expected = [trial.file for trial in work.trials()]
        absent, moved = run.reconcile(f"{work.folder('trials')}/kind=frozen", expected)
        stale += moved
        missing += [trial for trial in work.trials() if trial.file in set(absent)]
    if stale:
        console.print(f"{'sweep':<9} {stale} files of another configuration moved to superseded/")
    if missing:
        for work in works:
            for size in config.grid.target_size:
                run.require(work.feature_files(work.fold_split, size), "extract")
        _run_trials(config, works, missing, run, cluster, console)
    else:
        console.print(f"{'sweep':<9} nothing to do: all trials are there")
    for work in works:
        if work.trials():
            write_selected(work, run)
    return len(missing)


def _run_trials(
    config: Config,
    works: Sequence[TaskData],
    trials: list[Trial],
    run: RunDirectory,
    cluster: Cluster,
    console: Console,
) -> None:
    resources = trial_resources(cluster, config.resources)
    at_once = concurrent_trials(cluster, config.resources)
    packs = packed(trials, at_once or slots(cluster, resources))
    by_name = {work.task.name: work for work in works}
    cache = FeatureCache.options(num_cpus=0).remote(run, by_name)  # type: ignore[attr-defined]
    try:
        with StageProgress(console, "sweep", len(trials), "trials") as progress:
            run_trials(
                _run_pack,
                {"packs": packs, "works": by_name, "run": run, "cache": cache},
                len(packs),
                resources=resources,
                at_once=at_once,
                max_failures=config.resources.max_failures,
                on_done=lambda number: progress.advance(len(packs[number]), packs[number][0].task),
            )
    finally:
        ray.kill(cache)


def packed(trials: Sequence[Trial], n_slots: int) -> list[list[Trial]]:
    """Folds of the same features that one Tune trial does in turn.

    Starting a trial costs a fraction of a second, so many short ones are packed; but every slot gets several
    packs, so that none waits long for the last one.
    """
    size = max(1, len(trials) // (n_slots * PACKS_PER_SLOT))
    together = groupby(trials, lambda trial: (trial.task, trial.settings[0].target_size))
    packs = []
    for _, group in together:
        members = list(group)
        packs += [members[start : start + size] for start in range(0, len(members), size)]
    return packs


def _run_pack(number: int, shared: dict[str, Any]) -> None:
    for trial in shared["packs"][number]:
        work: TaskData = shared["works"][trial.task]
        if shared["run"].exists(trial.file):
            continue  # done before the worker of an earlier attempt died
        torch.set_num_threads(work.config.resources.cpus_per_trial)
        matrix = cached_features(shared["cache"], trial.task, trial.settings[0].target_size)
        shared["run"].write_frame(trial.file, run_trial(work, trial, matrix))


def run_trial(work: TaskData, trial: Trial, matrix: FeatureMatrix) -> pd.DataFrame:
    """Train all settings of a trial on its fold; one row each, in the order of the settings."""
    train, validation = (rows_of(matrix, rows) for rows in work.fold(trial.fold))
    started = time.perf_counter()
    held_out = _HeldOut(matrix.values[validation], matrix.labels[validation])
    rows = {}
    for head in fit_heads(work, matrix, train, trial.settings, [work.config.seed]):
        rows[head.settings] = held_out.score(head)
    seconds = (time.perf_counter() - started) / len(trial.settings)
    constant = {
        "backbone": backbone_folder(work.config),
        "task": work.task.name,
        "group": work.task.group,
        "fold": trial.fold,
        "seed": work.config.seed,
        "n_features": matrix.layout.n_features,
        "n_validation": len(validation),
        "seconds": seconds,
        "status": "done",
        "fold_scheme": work.config.cross_validation.scheme,
        "fingerprint": trial.file.rpartition("-")[2].removesuffix(".parquet"),
    }
    return pd.DataFrame([{**asdict(settings), **rows[settings], **constant} for settings in trial.settings])


class _HeldOut:
    """Validation rows; heads in a row that keep the same features share the selection of these."""

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        self.features, self.labels = features, labels
        self.kept: np.ndarray | None = None

    def score(self, head: Head) -> dict[str, Any]:
        if head.kept is not self.kept:
            self.kept = head.kept
            self.chosen = select_features(self.features, head.layout, head.kept)
        logits = self.chosen @ head.weight + head.bias
        return {
            "validation_accuracy": accuracy(self.labels, logits.argmax(1)),
            "validation_loss": cross_entropy(logits, self.labels),
            "n_kept": len(head.kept),
        }


def rows_of(matrix: FeatureMatrix, indices: np.ndarray) -> np.ndarray:
    """Rows of the matrix that hold the images ``indices``, in that order; skipped images are left out."""
    place = np.minimum(np.searchsorted(matrix.index, indices), len(matrix.index) - 1)
    return place[matrix.index[place] == indices]


def fit_heads(
    work: TaskData,
    matrix: FeatureMatrix,
    rows: np.ndarray,
    settings: Sequence[Hyperparameters],
    seeds: Sequence[int],
) -> Any:
    """Train heads on some rows of a task's features with the recipe's batch size, precision and memory."""
    config = work.config
    return fit(
        matrix.values,
        matrix.labels,
        matrix.layout,
        settings,
        rows=rows,
        n_classes=work.n_classes,
        embedding="pre_logits",
        seeds=seeds,
        batch_size=config.batch_size,
        memory_budget=int(config.resources.memory_per_trial_gb * 2**30),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=config.head_dtype,
    )


def select(trials: pd.DataFrame) -> pd.DataFrame:
    """The settings with the highest mean validation accuracy for each (backbone, task, method).

    Ties go to the lower mean validation loss, then to the earlier point of the grid.
    """
    keys = ["backbone", "task", "group"]
    done = trials[trials["status"] == "done"]
    means = done.groupby([*keys, *SETTINGS], sort=False).agg(
        validation_std=("validation_accuracy", "std"),
        validation_accuracy=("validation_accuracy", "mean"),
        validation_loss=("validation_loss", "mean"),
        n_folds=("fold", "nunique"),
    )
    means = means.reset_index()
    best = means.sort_values(
        ["validation_accuracy", "validation_loss"], ascending=[False, True], kind="stable"
    )
    chosen = best.groupby([*keys, "method"], sort=False).head(1).copy()
    counts = means.groupby([*keys, "method"]).size().rename("n_candidates").reset_index()
    chosen = chosen.merge(counts, on=[*keys, "method"])
    order = {name: place for place, name in enumerate(METHODS)}
    return chosen.sort_values("method", key=lambda names: names.map(order)).reset_index(drop=True)


def selected_file(work: TaskData) -> str:
    """Where the chosen settings of a task lie."""
    return work.file("selected", "frozen", "selected.parquet", [trial.file for trial in work.trials()])


def write_selected(work: TaskData, run: RunDirectory) -> None:
    """Choose the settings of every method of a task from its trials, where that was not done yet."""
    name = selected_file(work)
    missing, _ = run.reconcile(name.rpartition("/")[0], [name])
    if missing:
        run.write_frame(name, select(run.read_frame(trial.file for trial in work.trials())))


def read_selected(work: TaskData, run: RunDirectory) -> list[Hyperparameters]:
    """The chosen settings of every method of a task."""
    frame = run.read_frame([selected_file(work)])
    return [
        Hyperparameters(**{key: row[key] for key in SETTINGS}) for row in frame[SETTINGS].to_dict("records")
    ]
