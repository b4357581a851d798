"""Stage 3: final heads on all training images (Ray tasks), then test images through all of them (Ray Data).

The test split is read here alone, once: image → backbone → features → logits of every head of every
method and seed → predictions. Test features are never stored.
"""

import json
import resource
import time
from collections.abc import Sequence
from functools import partial
from itertools import groupby

import numpy as np
import ray
import torch

from h2t.adapter import load_head, save_head
from h2t.head2toe import HeadBank
from pipelines.artifacts import (
    HeadToTrain,
    chosen_from_trials,
    features,
    heads,
    identified_backbone,
    kept,
    predictions,
    read_manifest,
    required,
    results,
    write_rows,
)
from pipelines.choice import read_chosen
from pipelines.cluster import trial_resources
from pipelines.config import Config
from pipelines.feature_files import read_features
from pipelines.head_training import fit_heads, training_machine
from pipelines.products import Files, Gap, RowFiles, Shard, count_rows, shards
from pipelines.results import kept_rows, outcome_of_head, prediction_table, result_rows
from pipelines.run_directory import RunDirectory
from pipelines.schemas import KEPT, RESULTS
from pipelines.session import Advance, Session, Step
from pipelines.shard_stream import FeatureReader, process_shards
from pipelines.task_data import TaskData
from pipelines.worker_errors import raise_user_error, user_error_of


def final_heads(session: Session) -> dict[str, Files]:
    """The final heads of every task with methods on frozen features; needs the choices of the sweep."""
    products = {}
    for name, task in session.tasks.items():
        for choices in chosen_from_trials(task).units:
            points = read_chosen(session.run, required(session.run, choices, "sweep"), session.config.methods)
            products[name] = heads(task, points)
    return products


def train_heads(session: Session, missing: Sequence[HeadToTrain], advance: Advance) -> None:
    """Train the chosen points on all training images; heads of equal features together, as a Ray task."""
    cluster, run = session.cluster, session.run
    resources = trial_resources(cluster, session.config.resources)
    # The logical CPUs of a cluster that was started here are more than its cores.
    cpus = max(resources["cpu"], cluster.cpus / cluster.cores if cluster.local else 0)
    train = train_together.options(num_cpus=cpus, num_gpus=resources["gpu"])
    ordered = sorted(missing, key=lambda job: (job.task, job.point.target_size))
    pending = {}
    for (name, size), group in groupby(ordered, lambda job: (job.task, job.point.target_size)):
        task, jobs = session.tasks[name], list(group)
        pending[train.remote(task, jobs, features(task, "train", size).names(run), run)] = jobs
    while pending:
        (finished,), _ = ray.wait(list(pending), num_returns=1)
        raise_user_error([ray.get(finished)])
        jobs = pending.pop(finished)
        advance(len(jobs), jobs[0].task)


# The process ends with the task: an idle one would hold its memory, and its GPU's, beside the actors to come.
@ray.remote(max_retries=2, max_calls=1)
def train_together(
    task: TaskData, jobs: Sequence[HeadToTrain], feature_files: Sequence[str], run: RunDirectory
) -> str:
    """Train heads on the same features and save them; the text of a user's mistake, if there is one."""

    def train() -> None:
        matrix = read_features(run, feature_files)
        files = {(job.point, job.seed): job.file for job in jobs}
        points, seeds = (list(dict.fromkeys(values)) for values in zip(*files, strict=True))
        started = time.perf_counter()
        trained = list(fit_heads(task, matrix, points, seeds))
        seconds = (time.perf_counter() - started) / len(trained)
        source, _ = task.sources["train"]
        for head in trained:
            if name := files.get((head.hyperparameters, head.seed)):
                provenance = {
                    "backbone": json.dumps(identified_backbone(task.config)),
                    "task": task.name,
                    "train_seconds": f"{seconds:.3f}",
                    "peak_memory_bytes": str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
                    **{name: str(value) for name, value in training_machine().items()},
                }
                with run.writing(name) as sink:
                    save_head(
                        head, sink, provenance=provenance, classes=source.class_names() or task.n_classes
                    )

    return user_error_of(train)


def prediction_products(session: Session) -> list[RowFiles]:
    """The predictions of all final heads of a task for its test images."""
    return [
        predictions(session.tasks[name], "frozen", product.units)
        for name, product in final_heads(session).items()
    ]


def make_predictions(session: Session, gaps: Sequence[Gap], advance: Advance) -> None:
    """Stream the test images whose predictions are missing through all heads."""
    products = final_heads(session)
    files = {name: list(product.units) for name, product in products.items()}
    jobs = [job for product in products.values() for job in product.units.values()]
    sizes = sorted({job.point.target_size for job in jobs})
    missing = shards(gaps, session.config.resources.shard_size)
    process_shards(session, missing, partial(Predictor, session.run, files, sizes, session.config), advance)


class Predictor:
    """Step of the evaluation: a shard's test images to the predictions of all heads; state of an actor."""

    def __init__(
        self, run: RunDirectory, files: dict[str, list[str]], target_sizes: list[int], config: Config
    ) -> None:
        self.run, self.files, self.reader = run, files, FeatureReader(config, target_sizes)
        self.task = ""

    def __call__(self, task: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray) -> None:
        """Write the shard's predictions."""
        if self.task != task.name:
            self.heads = [load_head(self.run.read(name))[0] for name in self.files[task.name]]
            self.bank = HeadBank(self.heads, self.reader.device)
            self.task = task.name
        parts = [
            self.bank.logits({size: torch.cat(taps[size], 1) for size in self.bank.target_sizes})
            for taps in self.reader.read(images)
        ]
        logits = np.concatenate([np.empty((len(self.heads), 0, task.n_classes), np.float32), *parts], 1)
        columns = [(head.hyperparameters.method, head.seed) for head in self.heads]
        ((_, name),) = shard.files
        self.run.write_table(name, prediction_table(task, columns, index, [*logits]), compression="zstd")


def result_product(task: TaskData, files: Sequence[str]) -> Files:
    """The result rows of a task, which follow from its heads, their predictions and the choices."""
    keys = [predictions(task, "frozen", files).key, list(chosen_from_trials(task).units)]
    return results(task, "frozen", keys)


def result_products(session: Session) -> list[Files]:
    """The result rows and the kept features per tap of every task."""
    return [
        product
        for name, members in final_heads(session).items()
        for product in (
            result_product(session.tasks[name], list(members.units)), kept(session.tasks[name], members.units)
        )
    ]  # fmt: skip


def make_results(session: Session, tasks: Sequence[str], advance: Advance) -> None:
    """Write the rows of tasks from their heads and predictions, where they are missing."""
    run, heads_of = session.run, final_heads(session)
    for name in dict.fromkeys(tasks):  # one may lack both
        task, files = session.tasks[name], list(heads_of[name].units)
        (choices,), manifest = chosen_from_trials(task).units, read_manifest(task, run)
        weights = manifest["backbone"]["loaded"]
        outcomes, counts = [], []
        for file in files:  # one at a time: a head on all features can have gigabytes
            head, provenance = load_head(run.read(file))
            outcomes.append(outcome_of_head(head, provenance, weights, session.config.batch_size))
            counts += kept_rows(task, head)
        (rows_file,), (kept_file,) = result_product(task, files).units, kept(task, files).units
        if not run.exists(kept_file):
            write_rows(run, kept_file, KEPT, counts)
        if not run.exists(rows_file):
            predicted = run.read_frame(predictions(task, "frozen", files).names(run))
            rows = result_rows(task, outcomes, predicted, run.read_frame([choices]), manifest)
            write_rows(run, rows_file, RESULTS, rows)


STEPS = (
    Step("heads", "heads", lambda session: list(final_heads(session).values()), train_heads),
    Step("evaluate", "predictions", prediction_products, make_predictions, count_rows),
    Step("results", "results", result_products, make_results, brief=True),
)
