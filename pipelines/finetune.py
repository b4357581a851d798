"""Stage 4, Ray Tune and Ray Train: the methods that train the backbone, beside the frozen ones.

The same tasks, folds, seeds and files as the other stages. It comes after the evaluate stage, whose selected
features ``head2toe_ft`` reads through the taps and whose predictions ``head2toe_ft_plus`` may keep.
"""

import os
import tempfile
from collections.abc import Sequence
from typing import Any

from ray import train as ray_train
from ray.train.torch import TorchTrainer
from rich.console import Console

from h2t.errors import UserError
from h2t.finetuning import Selection
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from pipelines.cluster import Cluster, concurrent_trials, trial_resources
from pipelines.config import Config
from pipelines.extract import read_manifest
from pipelines.finetune_predict import predict_with_trained, prediction_files
from pipelines.finetune_trial import (
    TrainedTrial,
    checkpoint_folder,
    cross_validation_trials,
    frozen_for,
    run_trial,
    selection_of,
    trained_methods,
    trained_trial,
)
from pipelines.jobs import run_trials
from pipelines.progress import StageProgress
from pipelines.run_directory import RunDirectory
from pipelines.sweep import read_selected, selected_file
from pipelines.task_data import TaskData
from pipelines.trained_results import write_trained_results
from pipelines.trained_selection import read_trained_selected, trained_selected_file, write_trained_selected

WAITING_CPUS = 0.1  # logical CPUs of a trial that waits for its workers; Tune refuses none


def finetune(
    config: Config, works: Sequence[TaskData], run: RunDirectory, cluster: Cluster, console: Console
) -> int:
    """Run the missing trainings, predict the test images, write the rows; how many trainings ran.

    Raises UserError for a task and method of which no training had a finite loss, for settings that do not
    fit the memory or the cluster, and where an earlier stage has not been run.
    """
    for work in works if trained_methods(config) else []:
        read_manifest(work, run)  # result rows need it: better missed now than after all the training
    frozen = {work.task.name: _frozen_settings(work, run) for work in works}
    candidates = {work.task.name: _candidates(work, frozen[work.task.name]) for work in works}
    n_trials = run_missing(config, works, candidates, "trials", run, cluster, console)
    for work in works:
        write_trained_selected(work, candidates[work.task.name], frozen[work.task.name], run)
    final = {work.task.name: _final_trials(work, frozen[work.task.name], candidates, run) for work in works}
    n_trials += run_missing(config, works, final, "heads", run, cluster, console)
    predict_with_trained(config, works, final, run, cluster, console)
    for work in works:
        selected = trained_selected_file(work, candidates[work.task.name])
        write_trained_results(work, final[work.task.name], prediction_files(work, final), selected, run)
        for name in run.names(checkpoint_folder(work)):
            run.delete(name)
    return n_trials


def _frozen_settings(work: TaskData, run: RunDirectory) -> Hyperparameters | None:
    """What Head2Toe chose for a task, where a method builds on it."""
    if not any(METHODS[method].features == "selected" for method in trained_methods(work.config)):
        return None
    run.require([selected_file(work)], "sweep")
    (chosen,) = (settings for settings in read_selected(work, run) if settings.method == "head2toe")
    run.require((work.head_file(chosen, seed) for seed in work.config.seeds), "evaluate")
    return chosen


def _candidates(work: TaskData, frozen: Hyperparameters | None) -> list[TrainedTrial]:
    return [
        trial
        for method in trained_methods(work.config)
        for trial in cross_validation_trials(work, method, frozen_for(method, frozen))
    ]


def _final_trials(
    work: TaskData,
    frozen: Hyperparameters | None,
    candidates: dict[str, list[TrainedTrial]],
    run: RunDirectory,
) -> list[TrainedTrial]:
    chosen = read_trained_selected(work, candidates[work.task.name], run)
    return [
        trained_trial(work, settings, seed, None, frozen_for(settings.method, frozen))
        for settings in chosen
        for seed in work.config.finetune.seeds or work.config.seeds
    ]


def run_missing(
    config: Config,
    works: Sequence[TaskData],
    trials: dict[str, list[TrainedTrial]],
    folder: str,
    run: RunDirectory,
    cluster: Cluster,
    console: Console,
) -> int:
    """Run the trials whose file is missing; how many."""
    missing: list[TrainedTrial] = []
    for work in works:
        expected = {trial.file: trial for trial in trials[work.task.name]}
        absent, _ = run.reconcile(f"{work.folder(folder)}/kind=trained", expected)
        missing += [expected[name] for name in absent]
    what = "trials" if folder == "trials" else "models"
    if not trained_methods(config):
        return 0
    if not missing:
        console.print(f"{'finetune':<9} nothing to do: all {what} are there")
        return 0
    with StageProgress(console, "finetune", len(missing), what) as progress:
        _run_on_tune(config, works, missing, run, cluster, progress)
    return len(missing)


def _run_on_tune(
    config: Config,
    works: Sequence[TaskData],
    trials: list[TrainedTrial],
    run: RunDirectory,
    cluster: Cluster,
    progress: StageProgress,
) -> None:
    workers = config.finetune.workers_per_trial
    resources = trial_resources(cluster, config.resources)
    at_once = concurrent_trials(cluster, config.resources)
    if workers > 1:
        fits = _concurrent_groups(cluster, resources, workers)
        at_once = min(fits, config.resources.concurrent_trials or fits)
    shared = {"trials": trials, "works": {work.task.name: work for work in works}, "run": run,
              "resources": resources}  # fmt: skip
    run_trials(
        _run_piece,
        shared,
        len(trials),
        resources=resources if workers == 1 else {"cpu": WAITING_CPUS},
        at_once=at_once,
        max_failures=config.resources.max_failures,
        on_done=lambda number: progress.advance(1, _place(trials[number])),
    )


def _concurrent_groups(cluster: Cluster, resources: dict[str, float], workers: int) -> int:
    """How many trials of several workers fit the cluster at once."""
    fits = [cluster.cpus // (workers * resources["cpu"] + WAITING_CPUS)]
    if resources["gpu"]:
        fits.append(cluster.gpus // (workers * resources["gpu"]))
    if min(fits) < 1:
        raise UserError(
            f"finetune.workers_per_trial: {workers} workers of {resources['cpu']:g} CPUs and "
            f"{resources['gpu']:g} GPUs do not fit the cluster's {cluster.cpus} CPUs and {cluster.gpus} GPUs"
        )
    return int(min(fits))


def _place(trial: TrainedTrial) -> str:
    where = f"seed {trial.seed}" if trial.fold is None else f"fold {trial.fold}"
    return f"{trial.task} {trial.settings.method} {where}"


def _run_piece(number: int, shared: dict[str, Any]) -> None:
    trial: TrainedTrial = shared["trials"][number]
    work: TaskData = shared["works"][trial.task]
    if shared["run"].exists(trial.file):
        return  # done before the worker of an earlier attempt died
    selection = selection_of(work, trial, shared["run"])
    if work.config.finetune.workers_per_trial == 1:
        run_trial(work, trial, selection, shared["run"])
    else:
        _run_on_workers(work, trial, selection, shared["run"], shared["resources"])


def _run_on_workers(
    work: TaskData,
    trial: TrainedTrial,
    selection: Selection | None,
    run: RunDirectory,
    resources: dict[str, float],
) -> None:
    """The same training, data parallel on the workers of a ``TorchTrainer``.

    Raises UserError for a user's mistake that a worker meets.
    """

    def on_worker() -> None:
        run_trial(work, trial, selection, run)

    # Ray Train's own 30 s are too few where importing the libraries takes as long, and it starts all over.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TorchTrainer(
            on_worker,
            scaling_config=ray_train.ScalingConfig(
                num_workers=work.config.finetune.workers_per_trial,
                use_gpu=resources["gpu"] > 0,
                resources_per_worker={"CPU": resources["cpu"], "GPU": resources["gpu"]},
            ),
            run_config=ray_train.RunConfig(storage_path=scratch, name="workers"),
        )
        try:
            trainer.fit()
        except ray_train.WorkerGroupError as error:
            mistakes = [
                failure for failure in error.worker_failures.values() if isinstance(failure, UserError)
            ]
            raise (mistakes[0] if mistakes else error) from None
