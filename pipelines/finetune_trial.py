"""One training of a whole backbone, as it runs in a worker.

A training is a fold of the cross-validation, which leaves a row, or a final one on all training images, which
leaves the adapted model. With one worker it runs in the process of the trial itself; with several, under Ray
Train. The worker of rank 0 writes the file, so both ways leave the same.
"""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.distributed import get_rank, is_initialized

from h2t.backbones.loading import Backbone, load_backbone
from h2t.device import default_device, use_threads
from h2t.errors import UserError
from h2t.finetuning import (
    Checkpoints,
    KeptFeatures,
    OutOfMemory,
    TrainableModel,
    Training,
    embedding_features,
    predict_logits,
    save_model,
    train,
)
from h2t.images.preprocessing import Preprocessing, prepare
from h2t.images.source import BadImage
from h2t.methods import METHODS
from h2t.metrics import accuracy, cross_entropy
from pipelines.artifacts import Finetuning, task_columns, write_rows
from pipelines.backbone import preprocessing_of
from pipelines.config import Config
from pipelines.feature_files import read_features
from pipelines.head_training import fit_heads, shuffle_of, training_machine
from pipelines.model_files import read_head
from pipelines.run_directory import RunDirectory
from pipelines.schemas import TRIALS
from pipelines.shard_stream import read_in_turn
from pipelines.task_data import Split, TaskData

MEMORY_ADVICE = (
    "raise finetune.gradient_accumulation, set finetune.gradient_checkpointing: true or finetune.precision: "
    "bfloat16, or lower finetune.batch_size"
)


def backbone_to_train(config: Config, *, pretrained: bool, seed: int, device: str = "cpu") -> Backbone:
    """The backbone that a training starts from, float32; the seed draws weights that are not pretrained."""
    section = config.backbone
    return load_backbone(
        section.name,
        weights=section.weights if pretrained else "random",
        sha256=section.sha256 if pretrained else None,
        image_size=section.image_size,
        taps=section.taps,
        device=device,
        seed=seed,
    )


def base_features(
    task: TaskData, member: Finetuning, files: Sequence[str], run: RunDirectory
) -> KeptFeatures | None:
    """The features that the base of a training keeps on its rows; None for a training on the embedding.

    ``files``: the base's head for a final training; the stored features for a fold, on whose training rows
    alone they are chosen again, a small part of the training's time.
    """
    if member.base is None:
        return None
    if member.fold is None:
        head = read_head(run, files[0])[0]
    else:
        matrix = read_features(run, files)
        (head,) = fit_heads(task, matrix, [member.base], [member.seed], member.fold)
    return KeptFeatures(head.kept, head.layout, member.base.target_size)


def read_images(
    task: TaskData, split: Split, rows: np.ndarray, preprocessing: Preprocessing
) -> tuple[list[np.ndarray], np.ndarray]:
    """Images as ``prepare`` leaves them and labels int32 [n] of a split; bad ones are refused or left out."""
    known = {bad.index for bad in task.bad_rows if bad.split == split}
    rows = np.array([row for row in rows if row not in known], np.int64)
    images, kept = [], []
    for row, image in read_in_turn(task, split, rows.tolist()):
        try:
            images.append(prepare(image, preprocessing))
            kept.append(row)
        except BadImage as error:
            if task.config.on_bad_image == "refuse":
                raise UserError(f"{task.name}/{split} row {row} ({error.path}): {error.reason}") from None
    return images, task.labels[split][kept]


def run_training(
    task: TaskData, member: Finetuning, files: Sequence[str], checkpoint: str, run: RunDirectory
) -> None:
    """Train, and as rank 0 write the file; goes on from the checkpoint of a training that was killed.

    ``files``: see ``base_features``.
    """
    config, point = task.config, member.point
    device = default_device()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the trainings that this process has done before
    use_threads(config.resources.cpus_per_trial)
    pretrained = METHODS[point.method].pretrained
    backbone = backbone_to_train(config, pretrained=pretrained, seed=member.seed, device=device)
    preprocessing = preprocessing_of(config.backbone)
    kept = base_features(task, member, files, run) or embedding_features(backbone, point.target_size)
    model = TrainableModel(
        backbone,
        kept,
        task.n_classes,
        options=config.finetune.options(),
        seed=member.seed,
        aggregation=config.backbone.aggregation,
    )
    if member.fold is None:
        images, labels = read_images(task, "train", np.arange(len(task.labels["train"])), preprocessing)
    else:
        images, labels = read_images(task, task.fold_split, task.fold(member.fold)[0], preprocessing)
    with with_advice(OutOfMemory, MEMORY_ADVICE):
        training = train(
            model,
            images,
            labels,
            preprocessing,
            learning_rate=point.learning_rate,
            steps=point.steps,
            seed=member.seed,
            shuffle=shuffle_of(task, member.fold),
            checkpoints=Checkpoints(
                load=lambda: run.read(checkpoint) if run.exists(checkpoint) else None,
                save=lambda data: run.write(checkpoint, data),
            ),
        )
    if is_initialized() and get_rank() > 0:
        return
    content = describe(task, member, kept, training, backbone.weights)
    if member.fold is None:
        run.write(member.file, save_model(model, kept, content))
    else:
        write_rows(run, member.file, TRIALS, [trial_row(task, member, model, preprocessing, content)])
    if run.exists(checkpoint):
        run.delete(checkpoint)


def describe(
    task: TaskData, member: Finetuning, kept: KeptFeatures, training: Training, weights: str
) -> dict[str, Any]:
    """Plain values that say what a training was and how it went.

    ``peak_memory_bytes``: of the training's tensors on a GPU; else of the process, which may have done other
    trainings before.
    """
    epoch = -(-len(task.labels["train"]) // task.config.finetune.batch_size)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    source, _ = task.sources["train"]
    return {
        "hyperparameters": asdict(member.point),
        "task": task.name,
        "classes": list(source.class_names()) or task.n_classes,
        "seed": member.seed,
        "backbone": task.config.backbone.model_dump(mode="json"),
        "weights": weights,
        "n_features": kept.layout.n_features,
        "n_kept": len(kept.kept),
        "train_loss": float(np.mean(training.losses[-epoch:])) if len(training.losses) else float("nan"),
        "losses": [round(float(loss), 5) for loss in training.losses],
        "seconds": training.seconds,
        "peak_memory_bytes": peak,
        **training_machine(),
        "status": "done" if training.diverged_at is None else "failed",
        "diverged_at": training.diverged_at or 0,
    }


def trial_row(
    task: TaskData,
    member: Finetuning,
    model: TrainableModel,
    preprocessing: Preprocessing,
    content: dict[str, Any],
) -> dict[str, Any]:
    """The row of a fold; one whose loss was not finite has no accuracy and says at which step that was."""
    assert member.fold is not None
    images, labels = read_images(task, task.fold_split, task.fold(member.fold)[1], preprocessing)
    scores = {"validation_accuracy": float("nan"), "validation_loss": float("nan")}
    if content["status"] == "done":
        with with_advice(OutOfMemory, "lower resources.images_per_forward"):
            size = task.config.resources.images_per_forward
            logits = predict_logits(model, images, preprocessing, size)
        scores = {
            "validation_accuracy": accuracy(labels, logits.argmax(1)),
            "validation_loss": cross_entropy(logits, labels),
        }
    carried = ("n_features", "n_kept", "seconds", "status", "train_loss", "diverged_at")
    return {
        **task_columns(task),
        **asdict(member.point),
        **scores,
        **{name: content[name] for name in carried},
        "fold": member.fold,
        "seed": member.seed,
        "n_validation": len(labels),
        "fold_scheme": task.config.cross_validation.scheme,
        "trial": member.file.rpartition("-")[2].removesuffix(".parquet"),
    }


@contextmanager
def with_advice(kind: type[UserError], advice: str) -> Iterator[None]:
    """Add to a mistake of one kind what helps in a recipe."""
    try:
        yield
    except kind as error:
        raise UserError(f"{error}; {advice}") from error
