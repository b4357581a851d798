"""Stage 4, Ray Tune and Ray Train: the methods that train the backbone, beside the frozen ones.

The same tasks, folds, seeds and kinds of files as the other stages. It comes after the evaluate stage, as a
method may build on the features that a head keeps, or be the best of a frozen and a fine-tuned one.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import pandas as pd
from ray import train as ray_train
from ray.train.torch import TorchTrainer

from h2t.errors import UserError
from h2t.finetuning import model_content
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from pipelines import artifacts
from pipelines.artifacts import Finetuning, task_columns, write_rows
from pipelines.choice import best_of, choose, read_chosen, without_diverged
from pipelines.cluster import Cluster, concurrent_trials, trial_resources
from pipelines.config import Config
from pipelines.finetune_predict import FinetunedPredictor
from pipelines.finetune_trial import run_training
from pipelines.jobs import Job, run_jobs
from pipelines.products import Files, Gap, RowFiles, count_rows
from pipelines.results import Outcome, result_rows
from pipelines.run_directory import RunDirectory
from pipelines.schemas import CHOSEN, RESULTS
from pipelines.session import Advance, Session, Step
from pipelines.shard_stream import process_shards, shards_for
from pipelines.task_data import TaskData
from pipelines.worker_errors import raise_user_error

P = TypeVar("P", Files, RowFiles)
WAITING_CPUS = 0.1  # logical CPUs of a trial that waits for its workers; Tune refuses none


def trained_methods(config: Config) -> list[str]:
    """The methods of a recipe that train the backbone by a training of their own."""
    return [name for name in config.methods if METHODS[name].trains_backbone and not METHODS[name].best_of]


def best_methods(config: Config) -> list[str]:
    """The methods of a recipe that are the best of others."""
    return [name for name in config.methods if METHODS[name].best_of]


def per_task(session: Session, product: Callable[[TaskData, RunDirectory], P]) -> list[P]:
    """A product of every task, where the recipe has methods that train the backbone."""
    if not trained_methods(session.config):
        return []
    return [product(task, session.run) for task in session.tasks.values()]


def search_space(task: TaskData, method: str, run: RunDirectory) -> list[tuple[Hyperparameters, Any]]:
    """Every point of a method's search space, rates by steps (Appendix A), with the point of its base.

    A method that builds on another takes that one's chosen target size, coefficient and fraction.
    """
    config, base, builds_on = task.config, None, METHODS[method].builds_on
    if builds_on:
        (choices,) = artifacts.chosen_from_trials(task).units
        (base,) = read_chosen(run, artifacts.required(run, choices, "sweep"), [builds_on])
    start = base or Hyperparameters(method, config.grid.target_size[0], 0.0, 0)
    return [
        (replace(start, method=method, learning_rate=rate, steps=steps), base)
        for rate in config.finetune.learning_rate
        for steps in config.finetune.steps
    ]


def cross_validation(task: TaskData, run: RunDirectory) -> list[Finetuning]:
    """The trainings that choose every method's point on one task, on as many folds as the recipe says."""
    config = task.config
    n_folds = config.cross_validation.n_folds if config.finetune.folds is None else config.finetune.folds
    return [
        artifacts.finetuning(task, point, config.seed, fold, base)
        for method in trained_methods(config)
        for point, base in search_space(task, method, run)
        for fold in range(n_folds)
    ]


def trial_product(task: TaskData, run: RunDirectory) -> Files:
    """The cross-validation of every method; needs the features and, of a base, the final heads."""
    artifacts.read_manifest(task, run)  # result rows need it: better missed now than after all the training
    for method in trained_methods(task.config):
        _, base = search_space(task, method, run)[0]
        for seed in task.config.seeds if base else []:
            artifacts.required(run, artifacts.head_file(task, base, seed), "evaluate")
    return artifacts.finetunings(task, "trials", cross_validation(task, run))


def choice_product(task: TaskData, run: RunDirectory) -> Files:
    """The chosen points of a task; of the best of others too, which have no training of their own."""
    config = task.config
    keys = [
        [member.file for member in cross_validation(task, run)],
        [point for name in trained_methods(config) for point, _ in search_space(task, name, run)],
        best_methods(config), list(artifacts.chosen_from_trials(task).units),
    ]  # fmt: skip
    return artifacts.chosen(task, "finetuned", keys)


def make_choices(session: Session, tasks: Sequence[str], advance: Advance) -> None:
    """Choose the point of every method of a task.

    Raises UserError when the loss of no training of a method was finite.
    """
    run = session.run
    for task in map(session.tasks.__getitem__, tasks):
        (name,) = choice_product(task, run).units
        members = cross_validation(task, run)
        if members:
            chosen = choose(without_diverged(run.read_frame(member.file for member in members)))
        else:  # no fold has validated the one point of each method
            points = [
                point for m in trained_methods(session.config) for point, _ in search_space(task, m, run)
            ]
            once = {"n_folds": 0, "n_candidates": 1}
            chosen = pd.DataFrame([{**task_columns(task), **asdict(point), **once} for point in points])
        frozen = run.read_frame(artifacts.chosen_from_trials(task).units)
        for method in best_methods(session.config):
            chosen = pd.concat([chosen, best_of(method, pd.concat([frozen, chosen]))], ignore_index=True)
        artifacts.write_frame(run, name, CHOSEN, chosen)


def final_trainings(task: TaskData, run: RunDirectory) -> list[Finetuning]:
    """The trainings of the chosen points on all training images, one per seed."""
    methods = trained_methods(task.config)
    bases = {method: search_space(task, method, run)[0][1] for method in methods}
    (choices,) = choice_product(task, run).units
    return [
        artifacts.finetuning(task, point, seed, None, bases[point.method])
        for point in read_chosen(run, choices, methods)
        for seed in task.config.finetune.seeds or task.config.seeds
    ]


def model_product(task: TaskData, run: RunDirectory) -> Files:
    """The adapted models of a task."""
    return artifacts.finetunings(task, "heads", final_trainings(task, run))


def run_trainings(stage: str, session: Session, missing: Sequence[Finetuning], advance: Advance) -> None:
    """Run trainings as jobs of Ray Tune, each with one worker or several."""
    config, cluster = session.config, session.cluster
    workers = config.finetune.workers_per_trial
    resources = trial_resources(cluster, config.resources)
    run_jobs(
        session,
        stage,
        [as_job(session, member) for member in missing],
        run_job,
        {"tasks": dict(session.tasks), "run": session.run, "resources": resources},
        resources=resources if workers == 1 else {"cpu": WAITING_CPUS},
        concurrent=concurrent_trainings(cluster, config),
        on_done=lambda job: advance(1, job.name),
    )


def concurrent_trainings(cluster: Cluster, config: Config) -> int | None:
    """How many trainings run at once; None when the cluster's resources alone decide.

    Raises UserError when the workers of one do not fit the cluster.
    """
    workers, resources = config.finetune.workers_per_trial, trial_resources(cluster, config.resources)
    if workers == 1:
        return concurrent_trials(cluster, config.resources)
    fits = cluster.cpus // (workers * resources["cpu"] + WAITING_CPUS)
    if resources["gpu"]:
        fits = min(fits, cluster.gpus // (workers * resources["gpu"]))
    if fits < 1:
        raise UserError(
            f"finetune.workers_per_trial: {workers} workers of {resources['cpu']:g} CPUs and "
            f"{resources['gpu']:g} GPUs do not fit the cluster's {cluster.cpus} CPUs and {cluster.gpus} GPUs"
        )
    return int(min(fits, config.resources.concurrent_trials or fits))


def as_job(session: Session, member: Finetuning) -> Job:
    """A training as a job: the training, the files that its base is read from, and its checkpoint."""
    task, files = session.tasks[member.task], []
    if member.base and member.fold is None:
        files = [artifacts.head_file(task, member.base, member.seed)]
    elif member.base:
        files = artifacts.features(task, task.fold_split, member.base.target_size).names(session.run)
    end = f"seed{member.seed}" if member.fold is None else f"fold{member.fold}"
    point = member.point
    name = f"{member.task}-{point.method}-rate{point.learning_rate:g}-steps{point.steps}-{end}"
    config = {"task": member.task, "fold": member.fold, "seed": member.seed, **asdict(point)}
    return Job(name, config, (member, files, artifacts.checkpoint_file(task, member)))


def run_job(work: tuple[Finetuning, list[str], str], shared: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run one training, unless it was done before the worker of an earlier attempt died."""
    member, files, checkpoint = work
    task, run, resources = shared["tasks"][member.task], shared["run"], shared["resources"]
    train = partial(run_training, task, member, files, checkpoint, run)
    if not run.exists(member.file):
        workers = task.config.finetune.workers_per_trial
        train() if workers == 1 else run_on_workers(train, workers, resources)
    if member.fold is None:
        content = model_content(run.read_header(member.file))
        yield {"train_loss": content["train_loss"]}
    else:
        (row,) = run.read_frame([member.file]).to_dict("records")
        yield {"validation_accuracy": row["validation_accuracy"], "train_loss": row["train_loss"]}


def run_on_workers(train: partial[None], workers: int, resources: dict[str, float]) -> None:
    """The same training, data parallel on the workers of a ``TorchTrainer``.

    Raises UserError for a user's mistake that a worker meets.
    """
    # Ray Train's own 30 s are too few where importing the libraries takes as long, and it starts all over.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TorchTrainer(
            lambda: train(),
            scaling_config=ray_train.ScalingConfig(
                num_workers=workers,
                use_gpu=resources["gpu"] > 0,
                resources_per_worker={"CPU": resources["cpu"], "GPU": resources["gpu"]},
            ),
            run_config=ray_train.RunConfig(storage_path=scratch, name="workers"),
        )
        try:
            trainer.fit()
        except ray_train.WorkerGroupError as error:
            # A worker that returned early would leave the others waiting: here an exception is the way.
            failures = error.worker_failures.values()
            raise_user_error(str(failure) for failure in failures if isinstance(failure, UserError))
            raise


def prediction_product(task: TaskData, run: RunDirectory) -> RowFiles:
    """The predictions of all adapted models of a task for its test images."""
    return artifacts.predictions(task, "finetuned", [member.file for member in final_trainings(task, run)])


def make_predictions(session: Session, gaps: Sequence[Gap], advance: Advance) -> None:
    """Stream the test images whose predictions are missing through all adapted models."""
    models = {name: final_trainings(task, session.run) for name, task in session.tasks.items()}
    missing = shards_for(session, gaps)
    process_shards(session, missing, partial(FinetunedPredictor, session.run, models), advance)


def result_product(task: TaskData, run: RunDirectory) -> Files:
    """The result rows of a task; the best of others may copy rows of frozen heads, which have own seeds."""
    choices = list(choice_product(task, run).units)
    keys = [prediction_product(task, run).key, choices, task.config.seeds]
    return artifacts.results(task, "finetuned", keys)


def make_results(session: Session, tasks: Sequence[str], advance: Advance) -> None:
    """Write the rows of tasks from models and predictions; the best of others copies those that it chose."""
    run, config = session.run, session.config
    for task in map(session.tasks.__getitem__, tasks):
        members = final_trainings(task, run)
        predicted = prediction_product(task, run).names(run)
        chosen = run.read_frame(choice_product(task, run).units)
        rows = result_rows(
            task,
            [outcome_of_model(run, member, config) for member in members],
            run.read_frame(predicted),
            chosen,
            artifacts.read_manifest(task, run),
        )
        frozen = run.read_frame(run.keyed_names(artifacts.results(task, "frozen", []).folder, ".parquet"))
        for method in best_methods(config):
            (choice,) = chosen[chosen["method"] == method].to_dict("records")
            changed = {"method": method, "validation_accuracy": float(choice["validation_accuracy"])}
            candidates: list[dict[Any, Any]] = [*frozen.to_dict("records"), *rows]
            rows += [{**row, **changed} for row in candidates if row["method"] == choice["source"]]
        (name,) = result_product(task, run).units
        write_rows(run, name, RESULTS, rows)
    for task in session.tasks.values():
        for name in run.names(artifacts.checkpoints(task)):
            run.delete(name)


def outcome_of_model(run: RunDirectory, member: Finetuning, config: Config) -> Outcome:
    """The outcome of a training from the file of its model."""
    content = model_content(run.read_header(member.file))
    carried = (
        "n_features", "n_kept", "seconds", "peak_memory_bytes", "processor", "threads", "weights",
        "train_loss", "status", "diverged_at",
    )  # fmt: skip
    return Outcome(
        member.point,
        member.seed,
        **{name: content[name] for name in carried},
        scoring_steps=member.base.steps if member.base else None,
        batch_size=config.finetune.batch_size,
    )


STEPS = (
    Step("finetune", "trials", partial(per_task, product=trial_product),
         partial(run_trainings, "finetune-trials")),
    Step("choice", "choices", partial(per_task, product=choice_product), make_choices, brief=True),
    Step("finetune", "models", partial(per_task, product=model_product),
         partial(run_trainings, "finetune-models")),
    Step("finetune", "predictions", partial(per_task, product=prediction_product), make_predictions,
         count_rows),
    Step("results", "results", partial(per_task, product=result_product), make_results, brief=True),
)  # fmt: skip
