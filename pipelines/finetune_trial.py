"""Trainings of whole backbones: what each is, the file it leaves, and running one in a Tune trial.

A training is a fold of the cross-validation, which leaves a row, or a final one on all training images, which
leaves the adapted model. With one worker it runs in the process of the trial itself; with several, under Ray
Train. The worker of rank 0 writes the file, so both ways leave the same.
"""

import resource
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.distributed import get_rank, is_initialized

from h2t.adapter import load_head
from h2t.backbones.loading import Backbone, load_backbone
from h2t.errors import UserError
from h2t.finetuning import (
    Checkpoints,
    Selection,
    TrainableModel,
    Training,
    embedding_selection,
    predict_logits,
    save_model,
    train,
)
from h2t.hyperparameters import Hyperparameters
from h2t.images.preprocessing import Preprocessing, prepare
from h2t.images.source import BadImage
from h2t.methods import METHODS
from h2t.metrics import accuracy, cross_entropy
from pipelines.backbone_actor import preprocessing_of
from pipelines.config import Config, fingerprint
from pipelines.feature_files import read_features
from pipelines.run_directory import RunDirectory
from pipelines.sweep import fit_heads, rows_of
from pipelines.task_data import Split, TaskData, backbone_folder

WITHOUT_EFFECT = {"learning_rate", "steps", "folds", "seeds", "checkpoint_every", "workers_per_trial"}


@dataclass(frozen=True)
class TrainedTrial:
    """One training of a backbone; ``fold`` None means all training images.

    ``frozen``: the settings of Head2Toe whose features a method that selects features reads.
    """

    task: str
    settings: Hyperparameters
    seed: int
    fold: int | None
    frozen: Hyperparameters | None
    file: str


def trained_trial(
    work: TaskData, settings: Hyperparameters, seed: int, fold: int | None, frozen: Hyperparameters | None
) -> TrainedTrial:
    """The training with those settings and the name of its file."""
    # What Head2Toe keeps depends on how its heads are trained.
    read = frozen and [work.training, asdict(frozen)]
    parts = [training_fingerprint(work), asdict(settings), seed, read]
    if fold is None:
        name = f"{settings.method}-seed-{seed}.safetensors"
        return TrainedTrial(
            work.task.name, settings, seed, fold, frozen, work.file("heads", "trained", name, *parts)
        )
    name = f"{settings.method}-rate-{settings.learning_rate:g}-steps-{settings.steps}-fold-{fold}.parquet"
    parts += [work.config.cross_validation, fold]
    return TrainedTrial(
        work.task.name, settings, seed, fold, frozen, work.file("trials", "trained", name, *parts)
    )


def training_fingerprint(work: TaskData) -> str:
    """Changes with whatever every training of a task depends on, beside its settings, seed and fold."""
    config, options = work.config, work.config.finetune
    ignored = WITHOUT_EFFECT
    if options.workers_per_trial > 1 and options.batch_norm == "batch":
        ignored = ignored - {"workers_per_trial"}  # each normalises its part of a batch by itself
    return fingerprint(work.fingerprint, config.seed, options.model_dump(mode="json", exclude=ignored))


def backbone_to_train(config: Config, method: str, seed: int, device: str = "cpu") -> Backbone:
    """The backbone that a method starts from, float32; the seed draws the random weights of ``scratch``."""
    section = config.backbone
    scratch = method == "scratch"
    return load_backbone(
        section.name,
        weights="random" if scratch else section.weights,
        sha256=None if scratch else section.sha256,
        image_size=section.image_size,
        taps=section.taps,
        device=device,
        seed=seed,
    )


def selection_of(work: TaskData, trial: TrainedTrial, run: RunDirectory) -> Selection | None:
    """The features that Head2Toe selects on the rows of a trial; None for a method on the embedding.

    For a fold they are chosen again on its training rows alone, a small part of the training's time.
    """
    if trial.frozen is None:
        return None
    if trial.fold is None:
        head = load_head(run.read(work.head_file(trial.frozen, trial.seed)))[0]
    else:
        matrix = read_features(run, work.feature_files(work.fold_split, trial.frozen.target_size))
        rows = rows_of(matrix, work.fold(trial.fold)[0])
        (head,) = fit_heads(work, matrix, rows, [trial.frozen], [trial.seed])
    return Selection(head.kept, head.layout, trial.frozen.target_size)


def read_images(
    work: TaskData, split: Split, rows: np.ndarray, preprocessing: Preprocessing
) -> tuple[list[np.ndarray], np.ndarray]:
    """Images uint8 [height, width, 3] and labels int32 [n] of a split; bad ones are refused or left out."""
    known = {bad.index for bad in work.bad_rows if bad.split == split}
    rows = np.array([row for row in rows if row not in known], np.int64)
    images, kept = [], []
    for row, image in zip(rows, work.read(split, rows.tolist()), strict=True):
        try:
            images.append(prepare(image, preprocessing))
            kept.append(row)
        except BadImage as error:
            if work.config.on_bad_image == "refuse":
                raise UserError(
                    f"{work.task.name}/{split} row {row} ({error.path}): {error.reason}"
                ) from None
    return images, work.labels[split][kept]


def run_trial(work: TaskData, trial: TrainedTrial, selection: Selection | None, run: RunDirectory) -> None:
    """Train, and as rank 0 write the trial's file; goes on from the checkpoint of a killed trial."""
    config, settings = work.config, trial.settings
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the trials that this process has done before
    torch.set_num_threads(config.resources.cpus_per_trial)
    backbone = backbone_to_train(config, settings.method, trial.seed, device)
    preprocessing = preprocessing_of(config.backbone, backbone)
    selection = selection or embedding_selection(backbone, settings.target_size)
    model = TrainableModel(
        backbone,
        selection,
        work.n_classes,
        options=config.finetune,
        seed=trial.seed,
        cls_token=config.backbone.cls_token,
    )
    if trial.fold is None:
        images, labels = read_images(work, "train", work.row_order("train"), preprocessing)
    else:
        images, labels = read_images(work, work.fold_split, work.fold(trial.fold)[0], preprocessing)
    checkpoint = checkpoint_file(work, trial)
    done = train(
        model,
        images,
        labels,
        preprocessing,
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        seed=trial.seed,
        checkpoints=_checkpoints(checkpoint, run),
    )
    if is_initialized() and get_rank() > 0:
        return
    content = _content(work, trial, selection, done, backbone.weights)
    if trial.fold is None:
        run.write(trial.file, save_model(model, selection, content))
    else:
        run.write_frame(trial.file, pd.DataFrame([_row(work, trial, model, preprocessing, content)]))
    if run.exists(checkpoint):
        run.delete(checkpoint)


def checkpoint_folder(work: TaskData) -> str:
    """Where the checkpoints of unfinished trainings of a task lie."""
    return f"{work.folder('checkpoints')}/kind=trained"


def checkpoint_file(work: TaskData, trial: TrainedTrial) -> str:
    """The file of the checkpoint of a training, as long as that is unfinished."""
    return f"{checkpoint_folder(work)}/{trial.file.rpartition('/')[2]}.safetensors"


def _checkpoints(name: str, run: RunDirectory) -> Checkpoints:
    return Checkpoints(
        load=lambda: run.read(name) if run.exists(name) else None, save=lambda data: run.write(name, data)
    )


def _content(
    work: TaskData, trial: TrainedTrial, selection: Selection, done: Training, weights: str
) -> dict[str, Any]:
    """Plain values that describe a training.

    ``peak_memory_bytes``: of the training's tensors on a GPU; else of the process, which may have done other
    trainings before.
    """
    epoch = -(-len(work.labels["train"]) // work.config.finetune.batch_size)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "settings": asdict(trial.settings),
        "task": work.task.name,
        "seed": trial.seed,
        "backbone": work.config.backbone.model_dump(mode="json"),
        "weights": weights,
        "n_features": selection.layout.n_features,
        "n_kept": len(selection.kept),
        "train_loss": float(np.mean(done.losses[-epoch:])) if len(done.losses) else float("nan"),
        "losses": [round(float(loss), 5) for loss in done.losses],
        "seconds": done.seconds,
        "peak_memory_bytes": peak,
        "status": "done" if done.diverged_at is None else "failed",
        "diverged_at": done.diverged_at,
    }


def _row(
    work: TaskData,
    trial: TrainedTrial,
    model: TrainableModel,
    preprocessing: Preprocessing,
    content: dict[str, Any],
) -> dict[str, Any]:
    """The row of a fold; one whose loss was not finite has no accuracy and says at which step that was."""
    assert trial.fold is not None
    images, labels = read_images(work, work.fold_split, work.fold(trial.fold)[1], preprocessing)
    scores = {"validation_accuracy": float("nan"), "validation_loss": float("nan")}
    if content["status"] == "done":
        logits = predict_logits(model, images, preprocessing, work.config.resources.batch_size)
        scores = {
            "validation_accuracy": accuracy(labels, logits.argmax(1)),
            "validation_loss": cross_entropy(logits, labels),
        }
    return {
        **asdict(trial.settings),
        **scores,
        "n_kept": content["n_kept"],
        "backbone": backbone_folder(work.config),
        "task": work.task.name,
        "group": work.task.group,
        "fold": trial.fold,
        "seed": trial.seed,
        "n_features": content["n_features"],
        "n_validation": len(labels),
        "seconds": content["seconds"],
        "status": content["status"],
        "fold_scheme": work.config.cross_validation.scheme,
        "fingerprint": trial.file.rpartition("-")[2].removesuffix(".parquet"),
        "train_loss": content["train_loss"],
        "diverged_at": content["diverged_at"] or 0,
    }


def trained_methods(config: Config) -> list[str]:
    """The methods of a recipe that train the backbone by a training of their own."""
    return [m for m in config.methods if METHODS[m].trains_backbone and m != "head2toe_ft_plus"]


def frozen_for(method: str, frozen: Hyperparameters | None) -> Hyperparameters | None:
    """The frozen settings that a method reads the features of, or None."""
    return frozen if METHODS[method].features == "selected" else None


def trained_search_space(
    config: Config, method: str, frozen: Hyperparameters | None
) -> list[Hyperparameters]:
    """Every point of a method's search space: rates by steps (Appendix A)."""
    base = frozen or Hyperparameters(method, config.grid.target_size[0], 0.0, 0)
    return [
        replace(base, method=method, learning_rate=rate, steps=steps)
        for rate in config.finetune.learning_rate
        for steps in config.finetune.steps
    ]


def cross_validation_trials(
    work: TaskData, method: str, frozen: Hyperparameters | None
) -> list[TrainedTrial]:
    """The trials that choose a method's settings on one task, on as many folds as the recipe says."""
    n_folds, asked = work.config.cross_validation.n_folds, work.config.finetune.folds
    return [
        trained_trial(work, settings, work.config.seed, fold, frozen)
        for settings in trained_search_space(work.config, method, frozen)
        for fold in range(n_folds if asked is None else asked)
    ]
