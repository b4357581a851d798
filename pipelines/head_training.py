"""Training heads on stored features with the settings of a recipe; used by every stage that trains heads."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from h2t.backbones.loading import default_device
from h2t.head2toe import Head, fit
from h2t.hyperparameters import Hyperparameters
from pipelines.feature_files import FeatureMatrix
from pipelines.task_data import TaskData


def fit_heads(
    task: TaskData,
    matrix: FeatureMatrix,
    rows: np.ndarray,
    points: Sequence[Hyperparameters],
    seeds: Sequence[int],
) -> Iterator[Head]:
    """Train heads on some rows of a task's features, int64 [n_rows], in that order."""
    config = task.config
    torch.set_num_threads(config.resources.cpus_per_trial)
    return fit(
        matrix.values,
        matrix.labels,
        matrix.layout,
        points,
        rows=rows,
        n_classes=task.n_classes,
        embedding=matrix.embedding,
        seeds=seeds,
        batch_size=config.batch_size,
        memory_budget=int(config.resources.memory_per_trial_gb * 2**30),
        device=default_device(),
        precision=config.head_precision,
    )
