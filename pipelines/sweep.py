"""Stage 2, Ray Tune: cross-validation of every method on frozen features, and the choice it makes."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import ray
import torch
from ray import tune
from rich.console import Console

from h2t.config import Config
from h2t.errors import UserError
from h2t.feature_files import FeatureMatrix
from h2t.methods import METHODS, Head, Settings, fit, predict
from h2t.metrics import accuracy, cross_entropy
from h2t.store import RunDirectory
from h2t.work import TaskWork, Trial, backbone_folder
from pipelines.cluster import Cluster, concurrent_trials, trial_resources
from pipelines.features import FeatureCache, cached_features
from pipelines.progress import StageProgress

SETTINGS = ["method", "target_size", "learning_rate", "steps", "coefficient", "keep_fraction"]


def sweep(
    config: Config, works: Sequence[TaskWork], run: RunDirectory, cluster: Cluster, console: Console
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
        write_selected(work, run)
    return len(missing)


def _run_trials(
    config: Config,
    works: Sequence[TaskWork],
    trials: list[Trial],
    run: RunDirectory,
    cluster: Cluster,
    console: Console,
) -> None:
    resources = trial_resources(cluster, config.resources)
    cache = FeatureCache.options(num_cpus=0).remote(run, {work.task.name: work for work in works})  # type: ignore[attr-defined]
    shared = {"trials": trials, "works": {work.task.name: work for work in works}, "run": run, "cache": cache}
    with (
        StageProgress(console, "sweep", len(trials), "trials") as progress,
        tempfile.TemporaryDirectory() as scratch,
    ):
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trainable, shared=shared), resources),
            param_space={"trial": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(
                reuse_actors=True, max_concurrent_trials=concurrent_trials(cluster, config.resources)
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=config.resources.max_failures),
                callbacks=[_Advance(progress, trials)],
            ),
        )
        outcome = tuner.fit()
    ray.kill(cache)
    if outcome.num_errors:
        raise UserError(
            f"{outcome.num_errors} of {len(trials)} trials failed; the first: {outcome.errors[0]}"
        )


class _Advance(tune.Callback):
    def __init__(self, progress: StageProgress, trials: list[Trial]) -> None:
        self.progress, self.trials = progress, trials

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its state at the start, for a way to resume that is not used here

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        done = self.trials[trial.config["trial"]]
        self.progress.advance(1, f"{done.task} fold {done.fold}")


def _trainable(point: dict[str, int], shared: dict[str, Any]) -> None:
    trial: Trial = shared["trials"][point["trial"]]
    work: TaskWork = shared["works"][trial.task]
    torch.set_num_threads(work.config.resources.cpus_per_trial)
    matrix = cached_features(shared["cache"], trial.task, trial.settings[0].target_size)
    rows = run_trial(work, trial, matrix)
    shared["run"].write_frame(trial.file, rows)
    tune.report({"rows": len(rows)})


def run_trial(work: TaskWork, trial: Trial, matrix: FeatureMatrix) -> pd.DataFrame:
    """Train all settings of a trial on its fold; one row each, in the order of the settings."""
    train, validation = (rows_of(matrix, rows) for rows in work.fold(trial.fold))
    started = time.perf_counter()
    held_out = matrix.values[validation]
    rows = {}
    for head in fit_heads(work, matrix, train, trial.settings, [work.config.seed]):
        rows[head.settings] = _score(head, held_out, matrix.labels[validation])
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


def _score(head: Head, features: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    logits = predict(head, features)
    return {
        "validation_accuracy": accuracy(labels, logits.argmax(1)),
        "validation_loss": cross_entropy(logits, labels),
        "n_kept": len(head.kept),
    }


def rows_of(matrix: FeatureMatrix, indices: np.ndarray) -> np.ndarray:
    """Rows of the matrix that hold the images ``indices``, in that order; skipped images are left out."""
    place = np.minimum(np.searchsorted(matrix.index, indices), len(matrix.index) - 1)
    return place[matrix.index[place] == indices]


def fit_heads(
    work: TaskWork,
    matrix: FeatureMatrix,
    rows: np.ndarray,
    settings: Sequence[Settings],
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


def selected_file(work: TaskWork) -> str:
    """Where the chosen settings of a task lie."""
    return work.file("selected", "frozen", "selected.parquet", [trial.file for trial in work.trials()])


def write_selected(work: TaskWork, run: RunDirectory) -> None:
    """Choose the settings of every method of a task from its trials, where that was not done yet."""
    name = selected_file(work)
    missing, _ = run.reconcile(name.rpartition("/")[0], [name])
    if missing:
        run.write_frame(name, select(run.read_frame(trial.file for trial in work.trials())))


def read_selected(work: TaskWork, run: RunDirectory) -> list[Settings]:
    """The chosen settings of every method of a task."""
    frame = run.read_frame([selected_file(work)])
    return [Settings(**{key: row[key] for key in SETTINGS}) for row in frame[SETTINGS].to_dict("records")]
