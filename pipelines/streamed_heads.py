"""Tap kernels where no features are stored: trials by products of features, final heads from the images."""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np

from h2t.device import fetched
from h2t.features import FeatureLayout, unit_norm
from h2t.head2toe import Head
from h2t.heads.solution import Problem
from h2t.heads.tap_kernels import KernelHead, StreamedWeights, held_out_outputs, kernel_head, of_rows
from h2t.metrics import cross_entropy
from pipelines.artifacts import HeadToTrain, grams
from pipelines.backbone import layouts
from pipelines.cluster import reserved_memory
from pipelines.config import Config
from pipelines.gram_files import StoredGrams, open_grams
from pipelines.head_training import solving_memory, write_head
from pipelines.products import Shard
from pipelines.results import validation_columns
from pipelines.run_directory import RunDirectory
from pipelines.session import Advance, Session
from pipelines.shard_stream import ImageReader, Seen, process_shards
from pipelines.task_data import TaskData


def solved_by_products(task: TaskData, grams: StoredGrams, rows: np.ndarray) -> KernelHead:
    """The head of some training images, given by their rows."""

    def products(tap: int) -> np.ndarray:
        return of_rows(grams.read(tap), rows)

    def read(columns: slice) -> np.ndarray:
        raise AssertionError("no features are stored")

    return kernel_head(Problem(read, grams.labels[rows], task.n_classes, grams.layout, products))


def score_by_products(
    task: TaskData, grams: StoredGrams, rows: np.ndarray, held: np.ndarray
) -> dict[str, Any]:
    """Columns of ``schemas.TRIALS`` of a head of ``rows`` that is validated on the rows ``held``."""
    head = solved_by_products(task, grams, rows)
    logits, labels = held_out_outputs(head, grams.read, rows, held), grams.labels[held]
    train_loss = cross_entropy(head.outputs, grams.labels[rows])
    return validation_columns(logits, labels, grams.layout.n_features, train_loss)


def stream_heads(session: Session, missing: Sequence[HeadToTrain], advance: Advance) -> None:
    """Solve for the final heads of tasks, and take their images through the backbone for the weights."""
    by_task: dict[str, list[HeadToTrain]] = {}
    for job in missing:
        by_task.setdefault(job.task, []).append(job)
    n_images = {task: len(session.tasks[task].labels["train"]) for task in by_task}
    shards = [
        Shard(task, "train", 0, n_images[task], tuple((job, job.file) for job in jobs))
        for task, jobs in by_task.items()
    ]
    done: Counter[str] = Counter()

    def advance_heads(count: int, place: str) -> None:
        task = place.partition("/")[0]
        done[task] += count
        if done[task] == n_images[task]:
            advance(len(by_task[task]), task)

    memory = max(
        (_held(session, task, {job.point.target_size for job in jobs}) for task, jobs in by_task.items()),
        default=0,
    )
    reserved = reserved_memory(session.cluster, memory, "final heads of features that are stored nowhere")
    make_step = partial(HeadsWriter, session.run, session.config)
    process_shards(session, shards, make_step, advance_heads, reserved)


def _held(session: Session, task: str, sizes: Collection[int]) -> int:
    """Bytes that an actor takes: what one target size is solved in, and the weights of all."""
    weights = sum(12 * session.layouts[size].n_features * session.tasks[task].n_classes for size in sizes)
    return max(solving_memory(session, task, size) for size in sizes) + weights


class HeadsWriter:
    """Step of an actor: all training images of a task to its final heads."""

    def __init__(self, run: RunDirectory, config: Config) -> None:
        self.run, self.images = run, ImageReader(config)
        self.layouts = layouts(config, self.images.backbone)

    def __call__(
        self, task: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray, seen: Seen
    ) -> None:
        """Write the heads that the shard names; those of one target size differ by their seeds alone."""
        started = time.perf_counter()
        sizes = sorted({job.point.target_size for job, _ in shard.files})
        solved = {size: self._solved(task, size, index) for size in sizes}
        weights = {size: StreamedWeights(head, self.layouts[size]) for size, head in solved.items()}
        every = range(len(self.images.backbone.taps))
        for rows, pooled in self.images.read(images, every, sizes, seen):
            normed = [unit_norm(part, FeatureLayout(("tap",), part.shape[1:])) for part in pooled.values()]
            for (size, tap), part in zip(pooled, fetched(normed), strict=True):
                weights[size].add(tap, rows, part.numpy())
        solutions = {size: streamed.solution() for size, streamed in weights.items()}
        seconds = (time.perf_counter() - started) / len(shard.files)
        for job, name in shard.files:
            size = job.point.target_size
            layout, (weight, bias, *_) = self.layouts[size], solutions[size]
            loss = cross_entropy(solved[size].outputs, task.labels["train"][index])
            head = Head(job.point, job.seed, np.arange(layout.n_features), layout, weight, bias, loss)
            write_head(task, head, name, self.run, seconds)

    def _solved(self, task: TaskData, size: int, index: np.ndarray) -> KernelHead:
        layout = self.layouts[size]
        stored = open_grams(self.run, grams(task, "train", size, layout), layout)
        return solved_by_products(task, stored, stored.rows_of(index))
