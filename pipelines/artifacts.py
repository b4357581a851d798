"""The content of a run directory: the name and the key of every file; ``schemas.py`` has their columns.

Files lie in ``<kind>/<backbone>/…/<task>/…`` and end in their key, a fingerprint of what is computed:
versions of our semantics, what identifies backbone and images, hyperparameters, seeds. How the work is cut
and where files lie is in no key, so that a change of ``resources`` or of a path recomputes nothing. The
number of images in a forward pass changes features by float32 rounding at most: it is in no key either.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import pandas as pd
import pyarrow as pa

from h2t.backbones.pretrained import weights_identity
from h2t.errors import UserError
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from pipelines.config import Config, fingerprint
from pipelines.products import Files, KeyedFiles, RowFiles, Shard, Trial, TrialFiles
from pipelines.run_directory import RunDirectory
from pipelines.task_data import Split, TaskData

FEATURES_VERSION = 1  # raise it when a change of the code changes the features
HEADS_VERSION = 3  # likewise for heads on frozen features: the trainer, the rules that keep features
FINETUNING_VERSION = 2  # likewise for trained backbones

PREDICTIONS_VERSION = 2  # likewise for what is kept of predictions
KEPT_VERSION = 2  # likewise for what is told of kept features

Kind = Literal["frozen", "finetuned"]
"""Whether the backbone stays as it is or is trained."""


def write_rows(run: RunDirectory, name: str, schema: pa.Schema, rows: Iterable[Mapping[Any, Any]]) -> None:
    """Write rows as a Parquet file of a declared schema."""
    run.write_table(name, pa.Table.from_pylist(list(rows), schema=schema), compression="zstd")


def write_frame(run: RunDirectory, name: str, schema: pa.Schema, frame: pd.DataFrame) -> None:
    """Write a data frame as a Parquet file of a declared schema; what is NaN or not there becomes null."""
    table = pa.Table.from_pandas(frame.reindex(columns=schema.names), schema, preserve_index=False)
    run.write_table(name, table.replace_schema_metadata(), compression="zstd")


def backbone_folder(config: Config) -> str:
    """The backbone's name as it stands in paths and tables."""
    return config.backbone.name.replace("/", "_").replace(":", "_")


def identified_backbone(config: Config) -> dict[str, Any]:
    """The recipe's section with the hash of the weights, so that no others will be taken for them."""
    section = config.backbone
    kind, _, digest = weights_identity(section.name, section.weights, section.sha256).partition(" ")
    return section.model_dump(mode="json") | {"sha256": digest if kind == "sha256" else None}


def task_columns(task: TaskData) -> dict[str, str]:
    """The columns that say which backbone and task a row is of."""
    return {"backbone": backbone_folder(task.config), "task": task.name, "group": task.task.group}


def _folder(task: TaskData, first: str, *parts: str) -> str:
    return "/".join((first, backbone_folder(task.config), *(parts or (task.name,))))


# Keys: what is computed, never how the work is cut or where it lies.


def features_key(task: TaskData, split: Split) -> str:
    """Changes with whatever the features of a split depend on."""
    config = task.config
    backbone = config.backbone.model_dump(mode="json", exclude={"weights", "sha256"})
    weights = weights_identity(config.backbone.name, config.backbone.weights, config.backbone.sha256)
    return fingerprint(
        FEATURES_VERSION, backbone, weights, task.image_identity(split), split, config.on_bad_image,
        *([] if config.deterministic == "machine" else [config.deterministic]),
    )  # fmt: skip


def heads_key(task: TaskData, split: Split) -> str:
    """Changes with whatever all heads trained on a split depend on, beside hyperparameters and seed."""
    config = task.config
    return fingerprint(
        HEADS_VERSION, features_key(task, split), config.seed, config.batch_size, config.head_precision,
        task.n_classes,
    )  # fmt: skip


def _point_key(point: Hyperparameters) -> list[Any]:
    """A point with the definition of its method: a change of that makes other heads."""
    return [
        _stated(point),
        {name: v for name, v in _stated(METHODS[point.method]).items() if name != "title"},
    ]


def _stated(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults: a new field changes no key."""
    return {f.name: v for f in fields(value) if (v := getattr(value, f.name)) != f.default}


def _folds_key(task: TaskData) -> list[Any]:
    return [task.config.cross_validation.n_folds, task.config.cross_validation.scheme]


# The products of every stage.


def features(task: TaskData, split: Split, target_size: int) -> RowFiles:
    """Features of one split at one target size: a row per image, a list of float32 per tap."""
    folder = _folder(task, "features", f"target-size-{target_size}", task.name, split)
    n_rows = len(task.labels[split])
    return RowFiles(folder, features_key(task, split), task.name, split, n_rows, target_size, "extract")


def bad_rows_file(task: TaskData, shard: Shard) -> str:
    """The list of the bad rows of a shard, if it has some: one, however many tables are made of the rows."""
    key = features_key(task, shard.split)
    return f"{_folder(task, 'bad_rows')}/{shard.split}-{shard.start:06d}-{shard.stop:06d}-{key}.parquet"


def bad_rows(task: TaskData) -> KeyedFiles:
    """The lists of bad rows, which come with their shards, and that of files which are no rows at all."""
    folder = _folder(task, "bad_rows")
    left_out = f"{folder}/left-out-{fingerprint(list(task.left_out))}.parquet"
    keys = [features_key(task, split) for split in task.sources]
    return KeyedFiles(folder, keys, {left_out: task.name} if task.left_out else {})


def manifest(task: TaskData) -> Files:
    """The description of the features of a task: taps, backbone, its costs, images, packages."""
    sizes = sorted(task.config.grid.target_size)
    keys = [features_key(task, split) for split in task.stored_splits]
    folder = _folder(task, "manifests")
    return Files(folder, {f"{folder}/manifest-{fingerprint(keys, sizes)}.json": task.name})


def read_manifest(task: TaskData, run: RunDirectory) -> dict[str, Any]:
    """The content of a task's manifest. Raises UserError where there is none."""
    (name,) = manifest(task).units
    content: dict[str, Any] = run.read_json(required(run, name, "extract"))
    return content


def _frozen_points(config: Config) -> list[Hyperparameters]:
    """The points of all methods on frozen features; those that share the scoring phase stand side by side."""
    methods = [method for method in config.methods if not METHODS[method].trains_backbone]
    points = [point for method in methods for point in config.search_space(method)]
    return sorted(points, key=lambda p: (p.target_size, p.steps, p.learning_rate, p.coefficient))


def _trials_key(task: TaskData) -> str:
    return fingerprint(heads_key(task, task.fold_split), _folds_key(task))


def trials(task: TaskData) -> TrialFiles:
    """The cross-validation of the methods on frozen features, ordered by target size and fold."""
    points, context = _frozen_points(task.config), _trials_key(task)
    members = [
        Trial(task.name, fold, point, fingerprint(context, fold, _point_key(point)))
        for size in sorted({point.target_size for point in points})
        for fold in range(task.config.cross_validation.n_folds)
        for point in points
        if point.target_size == size
    ]
    return TrialFiles(_folder(task, "trials", task.name, "frozen"), context, tuple(members))


def chosen(task: TaskData, kind: Kind, keys: Sequence[Any]) -> Files:
    """The hyperparameters that cross-validation chose from trials of these keys."""
    folder = _folder(task, "chosen", task.name, kind)
    return Files(folder, {f"{folder}/chosen-{fingerprint(list(keys))}.parquet": task.name})


def chosen_from_trials(task: TaskData) -> Files:
    """The hyperparameters of the methods on frozen features; nothing where there are none."""
    points = [_point_key(point) for point in _frozen_points(task.config)]
    if not points:
        return Files(_folder(task, "chosen", task.name, "frozen"), {})
    return chosen(task, "frozen", [_trials_key(task), points])


def head_file(task: TaskData, point: Hyperparameters, seed: int) -> str:
    """The head with those hyperparameters, trained on all training images."""
    key = fingerprint(heads_key(task, "train"), _point_key(point), seed)
    return f"{_folder(task, 'heads', task.name, 'frozen')}/{point.method}-seed-{seed}-{key}.safetensors"


@dataclass(frozen=True)
class HeadToTrain:
    """A final head and its file."""

    task: str
    point: Hyperparameters
    seed: int
    file: str


def heads(task: TaskData, points: Sequence[Hyperparameters]) -> Files:
    """The final heads of the chosen points, one per seed."""
    jobs = [
        HeadToTrain(task.name, point, seed, head_file(task, point, seed))
        for point in points
        for seed in task.config.seeds
    ]
    return Files(_folder(task, "heads", task.name, "frozen"), {job.file: job for job in jobs})


@dataclass(frozen=True)
class Finetuning:
    """One training of a backbone and its file; ``fold`` None means all training images.

    ``base``: the point of the method that it builds on, whose kept features it reads.
    """

    task: str
    point: Hyperparameters
    seed: int
    fold: int | None
    base: Hyperparameters | None
    file: str


# Settings of `finetune` that change no training: what they choose is in the point and the fold, or nowhere.
_WITHOUT_EFFECT = {"learning_rate", "steps", "folds", "seeds", "checkpoint_every", "workers_per_trial"}


def finetuning_key(task: TaskData, split: Split) -> str:
    """Changes with whatever all trainings of a backbone on a split depend on, beside point, seed, fold."""
    options, ignored = task.config.finetune, _WITHOUT_EFFECT
    if options.workers_per_trial > 1 and options.batch_norm == "batch":
        ignored = ignored - {"workers_per_trial"}  # each normalises its part of a batch by itself
    settings = options.model_dump(mode="json", exclude=ignored)
    return fingerprint(FINETUNING_VERSION, features_key(task, split), task.config.seed, settings)


def finetuning(
    task: TaskData, point: Hyperparameters, seed: int, fold: int | None, base: Hyperparameters | None
) -> Finetuning:
    """The training with that point, a row of trials for a fold or an adapted model."""
    split: Split = "train" if fold is None else task.fold_split
    # What the base keeps depends on how its heads are trained.
    keys: list[Any] = [
        finetuning_key(task, split), _point_key(point), seed,
        base and [heads_key(task, split), _point_key(base)],
    ]  # fmt: skip
    if fold is None:
        folder = _folder(task, "heads", task.name, "finetuned")
        file = f"{folder}/{point.method}-seed-{seed}-{fingerprint(keys)}.safetensors"
    else:
        folder = _folder(task, "trials", task.name, "finetuned")
        stem = f"{point.method}-rate-{point.learning_rate:g}-steps-{point.steps}-fold-{fold}"
        file = f"{folder}/{stem}-{fingerprint(keys, _folds_key(task))}.parquet"
    return Finetuning(task.name, point, seed, fold, base, file)


def finetunings(task: TaskData, first: Literal["trials", "heads"], members: Sequence[Finetuning]) -> Files:
    """Trainings that leave rows ("trials") or adapted models ("heads")."""
    return Files(_folder(task, first, task.name, "finetuned"), {member.file: member for member in members})


def checkpoints(task: TaskData) -> str:
    """The folder of the checkpoints of unfinished trainings."""
    return _folder(task, "checkpoints")


def checkpoint_file(task: TaskData, member: Finetuning) -> str:
    """The checkpoint of a training, as long as that is unfinished."""
    return f"{checkpoints(task)}/{member.file.rpartition('/')[2]}.safetensors"


def predictions(task: TaskData, kind: Kind, models: Iterable[str]) -> RowFiles:
    """What heads or adapted models, given by their files, predict for the test images."""
    key = fingerprint(PREDICTIONS_VERSION, list(models), features_key(task, "test"))
    n_rows = len(task.labels["test"])
    stage = "evaluate" if kind == "frozen" else "finetune"
    folder = _folder(task, "predictions", task.name, kind)
    return RowFiles(folder, key, task.name, "test", n_rows, kind, stage)


def results(task: TaskData, kind: Kind, keys: Sequence[Any]) -> Files:
    """Result rows that follow from files of these names."""
    folder = _folder(task, "results", task.name, kind)
    return Files(folder, {f"{folder}/results-{fingerprint(list(keys))}.parquet": task.name})


def kept(task: TaskData, models: Iterable[str]) -> Files:
    """How many features of each tap the heads keep, and which."""
    folder = _folder(task, "kept", task.name, "frozen")
    return Files(folder, {f"{folder}/kept-{fingerprint(KEPT_VERSION, list(models))}.parquet": task.name})


def required(run: RunDirectory, name: str, stage: str) -> str:
    """The name of a file that is there; else a UserError that names the stage to run first."""
    if not run.exists(name):
        raise UserError(f"{name} is missing in {run.uri}: run the {stage} stage first")
    return name
