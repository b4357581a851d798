"""Result rows: what a finished training says of itself, its predictions, and what it cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from h2t.costs import BackboneCost, HeadSize, storage_bytes, training_flops
from h2t.head2toe import Head
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from h2t.metrics import Scores, accuracy, correct, cross_entropy, quality, scores
from pipelines.artifacts import backbone_folder, features_key, task_columns
from pipelines.schemas import PREDICTIONS
from pipelines.task_data import TaskData


@dataclass(frozen=True)
class Outcome:
    """What a finished training says of itself, with a frozen backbone or a fine-tuned one.

    ``weights``: the backbone's at the start; ``scoring_steps``: of the method that it builds on, if any.
    """

    hyperparameters: Hyperparameters
    seed: int
    n_features: int
    n_kept: int
    seconds: float
    peak_memory_bytes: int
    processor: str
    threads: int
    weights: str
    train_loss: float
    status: str = "done"
    diverged_at: int = 0
    scoring_steps: int | None = None
    batch_size: int = 128


def validation_columns(
    logits: np.ndarray, labels: np.ndarray, n_kept: int, train_loss: float
) -> dict[str, Any]:
    """Columns of ``schemas.TRIALS`` that say how well a head did on the validation rows."""
    return {
        "validation_accuracy": accuracy(labels, logits.argmax(1)),
        "validation_loss": cross_entropy(logits, labels),
        "n_kept": n_kept,
        "train_loss": train_loss,
    }


def result_row(
    task: TaskData,
    outcome: Outcome,
    predictions: pd.DataFrame,
    validation_accuracy: float,
    cost: BackboneCost,
) -> dict[str, Any]:
    """A row of ``schemas.RESULTS``; ``predictions``: rows of ``schemas.PREDICTIONS`` of the training."""
    point, config = outcome.hyperparameters, task.config
    done = outcome.status == "done"
    n_test = len(predictions)
    labels = predictions["label"].to_numpy()
    found = Scores(*(predictions[name].to_numpy() for name in Scores._fields))
    n_correct = correct(labels, found.prediction) if done else 0
    head = HeadSize(outcome.n_features, outcome.n_kept, task.n_classes)
    flops = training_flops(
        point.method,
        cost,
        head,
        outcome.scoring_steps or point.steps,
        finetuning_steps=point.steps,
        n_images=len(task.labels["train"]),
        batch_size=outcome.batch_size,
    )
    return {
        **task_columns(task),
        **asdict(point),
        "seed": outcome.seed,
        "status": outcome.status,
        "test_accuracy": n_correct / n_test if done else math.nan,
        **(quality(labels, found) if done else {}),
        "n_test": n_test,
        "n_correct": n_correct,
        "n_train": len(task.labels["train"]),
        "n_classes": task.n_classes,
        "n_features": outcome.n_features,
        "n_kept": outcome.n_kept,
        "validation_accuracy": validation_accuracy,
        "train_loss": outcome.train_loss,
        "diverged_at": outcome.diverged_at,
        "train_seconds": outcome.seconds,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "processor": outcome.processor,
        "threads": outcome.threads,
        "modelled_flops": flops,
        "modelled_storage_bytes": storage_bytes(point.method, cost, head),
        "image_source": config.task_images(task.name).format,
        "preprocessing": f"{config.backbone.resize}, {config.backbone.normalization}",
        "fold_scheme": config.cross_validation.scheme,
        "weights": outcome.weights,
        "fingerprint": features_key(task, "train"),
    }


def result_rows(
    task: TaskData,
    outcomes: Sequence[Outcome],
    predictions: pd.DataFrame,
    chosen: pd.DataFrame,
    manifest: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A row for each outcome, from predictions of all of them and the choices that they rest on."""
    cost, validation = BackboneCost(**manifest["cost"]), chosen.set_index("method")["validation_accuracy"]
    by_head = dict(iter(predictions.groupby(["method", "seed"], sort=False)))
    return [
        result_row(task, outcome, by_head[method, outcome.seed], float(validation[method]), cost)
        for outcome in outcomes
        for method in [outcome.hyperparameters.method]
    ]


def outcome_of_head(head: Head, provenance: Mapping[str, str], weights: str, batch_size: int) -> Outcome:
    """The outcome of a head on frozen features, as ``train_together`` described it."""
    return Outcome(
        head.hyperparameters,
        head.seed,
        head.layout.n_features,
        len(head.kept),
        float(provenance["train_seconds"]),
        int(provenance["peak_memory_bytes"]),
        provenance["processor"],
        int(provenance["threads"]),
        weights,
        head.train_loss,
        batch_size=batch_size,
    )


def kept_rows(task: TaskData, head: Head) -> list[dict[str, Any]]:
    """Rows of ``schemas.KEPT``: how many features of each tap a head keeps, and which."""
    counts = np.bincount(head.layout.tap_of(head.kept), minlength=len(head.layout.taps))
    shared = {**task_columns(task), "method": head.hyperparameters.method, "seed": head.seed}
    chosen = METHODS[head.hyperparameters.method].features == "kept"
    parts = np.split(head.kept, np.cumsum(counts)[:-1])
    return [
        {
            **shared, "tap": tap, "tap_index": index, "n_features": width, "n_kept": len(kept),
            "kept": (kept - start).tolist() if chosen else None,
        }
        for index, (tap, width, start, kept) in enumerate(
            zip(head.layout.taps, head.layout.widths, head.layout.offsets[:-1], parts, strict=True)
        )
    ]  # fmt: skip


def _diverged(n_rows: int) -> Scores:
    unknown = np.full(n_rows, np.nan, np.float32)
    return Scores(np.full(n_rows, -1, np.int32), unknown, unknown, unknown)


def prediction_table(
    task: TaskData, heads: Sequence[tuple[str, int]], index: np.ndarray, logits: Sequence[np.ndarray | None]
) -> pa.Table:
    """Rows of ``schemas.PREDICTIONS`` of images ``index`` int32 [n].

    ``heads``: method and seed of each; ``logits``: float [n, n_classes] of each, None where it diverged.
    """
    n, labels = len(index), task.labels["test"][index]
    of_heads = [_diverged(n) if values is None else scores(values, labels) for values in logits]
    scored = {name: np.concatenate([getattr(part, name) for part in of_heads]) for name in Scores._fields}
    columns = {
        "backbone": pa.repeat(pa.scalar(backbone_folder(task.config)), n * len(heads)),
        "task": pa.repeat(pa.scalar(task.name), n * len(heads)),
        "method": pa.array([method for method, _ in heads for _ in range(n)], pa.string()),
        "seed": np.repeat(np.array([seed for _, seed in heads], np.int32), n),
        "index": np.tile(np.asarray(index, np.int32), len(heads)),
        "label": np.tile(labels, len(heads)),
        **scored,
    }
    return pa.table(columns, schema=PREDICTIONS)
