"""Training heads on stored features with the settings of a recipe; used by every stage that trains heads."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from h2t.device import default_device, processor
from h2t.head2toe import Head, fit
from h2t.hyperparameters import Hyperparameters
from pipelines.feature_files import FeatureMatrix
from pipelines.task_data import TaskData


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
) -> Iterator[Head]:
    """Train heads on a task's features: on all rows, or on the training rows of a fold."""
    config = task.config
    rows = np.arange(len(matrix.labels)) if fold is None else matrix.rows_of(task.fold(fold)[0])
    torch.set_num_threads(config.resources.cpus_per_trial)
    return fit(
        matrix.values,
        matrix.labels,
        matrix.layout,
        points,
        rows=rows,
        shuffle=shuffle_of(task, fold),
        n_classes=task.n_classes,
        embedding=matrix.embedding,
        seeds=seeds,
        batch_size=config.batch_size,
        memory_budget=int(config.resources.memory_per_trial_gb * 2**30),
        device=default_device(),
        precision=config.head_precision,
    )
