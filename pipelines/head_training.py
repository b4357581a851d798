"""Training heads on stored features with the settings of a recipe; used by every stage that trains heads."""

import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import ray
import torch

from h2t.adapter import save_head
from h2t.costs import fitting_flops, shared_training
from h2t.device import default_device, processor, use_threads
from h2t.head2toe import Head, fit
from h2t.heads.tap_kernels import MIXTURE_ROWS
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from pipelines.artifacts import HeadToTrain, features, grams, identified_backbone
from pipelines.cluster import RESERVED_FROM, reserved_memory, slots, trial_resources
from pipelines.feature_cache import cached_features, feature_cache
from pipelines.feature_files import FeatureMatrix, open_features, read_features
from pipelines.gram_files import open_grams
from pipelines.model_files import read_head
from pipelines.packing import pieces
from pipelines.products import Files, RowFiles
from pipelines.run_directory import RunDirectory
from pipelines.scope import EVERYTHING, Scope
from pipelines.session import Advance, Session
from pipelines.task_data import TaskData
from pipelines.worker_errors import as_finished, user_error_of

PROCESS_BYTES = 2**29  # of a worker that has loaded torch
LEAST_FLOPS = 1e12  # of a task that trains heads: it starts a process and loads torch there


def shuffle_of(task: TaskData, fold: int | None) -> tuple[int, int]:
    """Numbers that, with the seed of a training, draw the order of its rows: of the run, and of the fold."""
    return task.config.seed, 0 if fold is None else fold + 1


def training_machine() -> dict[str, Any]:
    """Columns of ``schemas.RESULTS`` that say what trains here: sums are rounded otherwise elsewhere."""
    return {"processor": processor(), "threads": torch.get_num_threads()}


def fit_heads(
    task: TaskData,
    matrix: FeatureMatrix,
    points: Sequence[Hyperparameters],
    seeds: Sequence[int],
    fold: int | None = None,
    scope: Scope = EVERYTHING,
    kept: Mapping[int, np.ndarray] | None = None,
    products: Callable[[int], np.ndarray] | None = None,
) -> Iterator[Head]:
    """Train heads on a task's features: on all rows of the scope, or on the training rows of a fold.

    ``kept``: seed -> the features to train on, in place of those that the points' rules would keep;
    ``products``: from a tap to those of its features with each other, if they are known.
    """
    config = task.config
    shots = scope.shots
    rows = matrix.rows_of(task.subset("train", shots) if fold is None else task.fold(fold, shots)[0])
    use_threads(config.resources.cpus_per_trial)
    return fit(
        matrix.values,
        matrix.labels,
        matrix.layout,
        points,
        rows=rows,
        taps=scope.taps,
        kept=kept,
        products=products,
        shuffle=shuffle_of(task, fold),
        n_classes=task.n_classes,
        embedding=matrix.embedding,
        seeds=seeds,
        batch_size=config.batch_size,
        memory_budget=int(config.resources.memory_per_trial_gb * 2**30),
        device=default_device(),
        precision=config.head_precision,
    )


def training_memory(
    session: Session, task: str, points: Sequence[Hyperparameters], scope: Scope, n_seeds: int = 1
) -> int:
    """Bytes that training takes beside the matrix of features: a copy of it, the heads and the process."""
    config, data = session.config, session.tasks[task]
    layout = session.layouts[points[0].target_size]
    on_all = {shared_training(p) for p in points if METHODS[p.method].features != "embedding"}
    widths = dict(zip(layout.taps, layout.widths, strict=True))
    width = layout.n_features if on_all else widths[session.backbone.embedding]
    if on_all and scope.taps:
        width += sum(widths[tap] for tap in scope.taps)  # a copy of these columns, which are then normalised
    heads = 3 * 4 * width * data.n_classes * n_seeds * max(len(on_all), 1)
    copy = 4 * len(data.labels[data.fold_split]) * width
    return copy + min(heads, int(config.resources.memory_per_trial_gb * 2**30)) + PROCESS_BYTES


def solving_memory(session: Session, task: str, target_size: int) -> int:
    """Bytes that solving for tap kernels takes: the kernels, the features of a tap and the weights of all."""
    data, layout = session.tasks[task], session.layouts[target_size]
    n_rows = len(data.labels[data.fold_split])
    kernels = 4 * len(layout.taps) * min(n_rows, MIXTURE_ROWS) ** 2
    square, block = 8 * n_rows**2, 4 * n_rows * max(layout.widths)
    return kernels + 6 * square + 4 * block + 2 * 4 * layout.n_features * data.n_classes + PROCESS_BYTES


def training_flops(
    session: Session, task: str, points: Sequence[Hyperparameters], n_images: int | None = None
) -> int:
    """Operations of training points of one target size on so many of a task's images, or on all of them."""
    data, layout = session.tasks[task], session.layouts[points[0].target_size]
    n_images = len(data.labels["train"]) if n_images is None else n_images
    return fitting_flops(
        points, layout, session.backbone.embedding, data.n_classes, n_images, session.config.batch_size
    )


def train_heads(session: Session, missing: Sequence[HeadToTrain], advance: Advance) -> None:
    """Train the chosen points on all training images; heads of equal features together, as a Ray task.

    Where devices are many, heads that share no training are cut further.
    """
    cluster, run = session.cluster, session.run
    resources = trial_resources(cluster, session.config.resources)
    # The logical CPUs of a cluster that was started here are more than its cores.
    cpus = max(resources["cpu"], cluster.cpus / cluster.cores if cluster.local else 0)
    tables: dict[tuple[str, int], RowFiles] = {}
    groups: dict[tuple[str, int, bool], dict[Any, list[HeadToTrain]]] = {}
    for job in missing:
        key = job.task, job.point.target_size, job.reads_by_tap
        if key[:2] not in tables:
            tables[key[:2]] = features(session.tasks[job.task], "train", key[1])
        # One that is solved for is the same for every seed.
        seed = None if key[2] else job.seed
        groups.setdefault(key, {}).setdefault((shared_training(job.point), seed, job.scope), []).append(job)
    for table in tables.values():
        table.names(run)  # raises where some are not there
    parts = pieces(
        [list(group.values()) for group in groups.values()],
        lambda jobs: training_flops(session, jobs[0].task, [job.point for job in jobs]),
        slots(cluster, resources | {"cpu": cpus}),
        per_slot=1,
        least=LEAST_FLOPS,
    )
    # A matrix that is small is read faster than it is shared: that takes processes of its own.
    matrices = {key[:2]: tables[key[:2]] for key in groups if not key[2]}
    large = max((session.matrix_bytes[size] for _, size in matrices), default=0) >= RESERVED_FROM
    with feature_cache(session, matrices) if large else nullcontext() as cache:
        pending: dict[ray.ObjectRef, list[HeadToTrain]] = {}
        for part in parts:
            jobs = [job for members in part for job in members]
            task, points = session.tasks[jobs[0].task], list({job.point for job in jobs})
            n_seeds = len({job.seed for job in jobs})
            size, product = points[0].target_size, None
            if jobs[0].reads_by_tap:
                wanted = solving_memory(session, task.name, size)
                product = grams(task, "train", size, session.layouts[size])
            else:
                wanted = max(
                    training_memory(session, task.name, points, scope, n_seeds)
                    for scope in {job.scope for job in jobs}
                )
            what = f"{task.name}: training heads at target size {size}"
            train = train_together.options(
                num_cpus=cpus, num_gpus=resources["gpu"], memory=reserved_memory(cluster, wanted, what)
            )
            table = tables[task.name, size]
            pending[train.remote(task, jobs, table, product, cache, run)] = jobs
        for jobs in as_finished(pending, "trained final heads"):
            advance(len(jobs), jobs[0].task)


# The process ends with the task: an idle one would hold its memory, and its GPU's, beside the actors to come.
@ray.remote(max_retries=2, max_calls=1)
def train_together(
    task: TaskData,
    jobs: Sequence[HeadToTrain],
    table: RowFiles,
    product: Files | None,
    cache: ray.actor.ActorHandle | None,
    run: RunDirectory,
) -> str:
    """Train heads on the same features and save them; the text of a user's mistake, if there is one."""

    def train() -> None:
        products = None
        if product:
            matrix = open_features(run, table.names(run))
            products = open_grams(run, product, matrix.layout).read
        elif cache:
            matrix = cached_features(cache, task.name, jobs[0].point.target_size)
        else:
            matrix = read_features(run, table.names(run))
        by_scope: dict[Scope, list[HeadToTrain]] = {}
        for job in jobs:
            by_scope.setdefault(job.scope, []).append(job)
        for members in by_scope.values():
            _train_scope(task, members, matrix, run, products)

    return user_error_of(train)


def _train_scope(
    task: TaskData,
    jobs: Sequence[HeadToTrain],
    matrix: FeatureMatrix,
    run: RunDirectory,
    products: Callable[[int], np.ndarray] | None,
) -> None:
    """Train and save heads on the same part of the features; some are wanted in several files."""
    files: dict[tuple[Hyperparameters, int], list[str]] = {}
    for job in jobs:
        files.setdefault((job.point, job.seed), []).append(job.file)
    points, seeds = (list(dict.fromkeys(values)) for values in zip(*files, strict=True))
    kept = {job.seed: read_head(run, job.kept)[0].kept for job in jobs if job.kept}
    started = time.perf_counter()
    trained = list(fit_heads(task, matrix, points, seeds, scope=jobs[0].scope, kept=kept, products=products))
    seconds = (time.perf_counter() - started) / len(trained)
    for head in trained:
        for name in files.get((head.hyperparameters, head.seed), []):
            write_head(task, head, name, run, seconds)


def write_head(task: TaskData, head: Head, name: str, run: RunDirectory, seconds: float) -> None:
    """Save a head that took so many seconds, with where it comes from."""
    source, _ = task.sources["train"]
    provenance = {
        "backbone": json.dumps(identified_backbone(task.config)),
        "task": task.name,
        "train_seconds": f"{seconds:.3f}",
        "peak_memory_bytes": str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        **{name: str(value) for name, value in training_machine().items()},
    }
    with run.writing(name) as sink:
        save_head(head, sink, provenance=provenance, classes=source.class_names() or task.n_classes)
