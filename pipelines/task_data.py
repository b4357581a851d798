"""What a run consists of: shards of images, trials and heads, each with the name of its file.

Everything here follows from the configuration and the labels of the images, before anything runs.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from h2t.errors import UserError
from h2t.folds import folds
from h2t.hyperparameters import Hyperparameters
from h2t.images.formats import open_source
from h2t.images.source import BadRow, Image, ImageSource, check_rows
from h2t.methods import METHODS
from h2t.tasks import Task
from pipelines.config import Config, fingerprint

Split = Literal["train", "test", "folds"]  # "folds": other images for the cross-validation, where given
Kind = Literal["frozen", "trained"]  # whether the backbone stays as it is or is trained


@dataclass(frozen=True)
class Shard:
    """Rows of one split of one task that are read, computed and written together."""

    task: str
    split: Split
    number: int
    start: int
    stop: int

    @property
    def indices(self) -> range:
        """The rows of the split that the shard holds."""
        return range(self.start, self.stop)


@dataclass(frozen=True)
class Trial:
    """Hyperparameters that are trained together on one fold of one task (they share the feature matrix)."""

    task: str
    fold: int
    settings: tuple[Hyperparameters, ...]
    file: str


@dataclass(frozen=True)
class TaskData:
    """A task with its images opened: the sources, the labels int32 [n] of each split, rows to leave out."""

    config: Config
    task: Task
    source: ImageSource
    fold_source: ImageSource | None
    labels: dict[Split, np.ndarray]
    bad_rows: tuple[BadRow, ...] = ()

    @property
    def fold_split(self) -> Split:
        """The split that is cut into folds."""
        return "folds" if self.fold_source else "train"

    @property
    def stored_splits(self) -> list[Split]:
        """The splits whose features are stored."""
        return ["train", "folds"] if self.fold_source else ["train"]

    def source_of(self, split: Split) -> tuple[ImageSource, Literal["train", "test"]]:
        """Where the images of a split come from, and what the split is called there."""
        if split == "folds":
            assert self.fold_source is not None
            return self.fold_source, "train"
        return self.source, split

    def read(self, split: Split, rows: Sequence[int]) -> list[Image]:
        """Images of some rows of a split, encoded or as pixels."""
        source, name = self.source_of(split)
        return source.read(name, rows)

    def folder(self, stage: str) -> str:
        """The folder of one stage's files of this task: ``<stage>/backbone=…/task=…``."""
        return f"{stage}/backbone={backbone_folder(self.config)}/task={self.task.name}"

    def file(self, stage: str, kind: Kind, name: str, *parts: object) -> str:
        """A file of a stage, its name ending in the fingerprint of ``parts``."""
        stem, _, ending = name.rpartition(".")
        return f"{self.folder(stage)}/kind={kind}/{stem}-{fingerprint(*parts)}.{ending}"

    @cached_property
    def n_classes(self) -> int:
        """The number of classes: the task's, or what the labels of both splits show."""
        if self.task.n_classes:
            return self.task.n_classes
        return max(int(labels.max(initial=0)) for labels in self.labels.values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Changes with whatever the features depend on: backbone, preprocessing, images, shards."""
        config = self.config
        images = config.task_images(self.task.name)
        labels = {
            split: hashlib.sha256(labels.tobytes()).hexdigest() for split, labels in self.labels.items()
        }
        return fingerprint(config.backbone, images, config.cross_validation.images, self.task.name, labels,
                           config.resources.shard_size, config.resources.batch_size,
                           config.on_bad_image)  # fmt: skip

    def shards(self, split: Split) -> list[Shard]:
        """The split cut into shards of fixed size."""
        size, n = self.config.resources.shard_size, len(self.labels[split])
        return [
            Shard(self.task.name, split, number, start, min(start + size, n))
            for number, start in enumerate(range(0, n, size))
        ]

    def feature_folder(self, split: Split, target_size: int) -> str:
        """Where the features of a split lie."""
        return f"{self.folder('features')}/split={split}/target_size={target_size}"

    def feature_file(self, shard: Shard, target_size: int) -> str:
        """The file of one shard's features of one target size."""
        folder = self.feature_folder(shard.split, target_size)
        return f"{folder}/part-{shard.number:05d}-{self.fingerprint}.parquet"

    def feature_files(self, split: Split, target_size: int) -> list[str]:
        """Names of the feature files of a split, one per shard."""
        return [self.feature_file(shard, target_size) for shard in self.shards(split)]

    def row_order(self, split: Split) -> np.ndarray:
        """One shuffle of a split's rows by the run's seed, int64 [n]; all training uses it."""
        return np.random.default_rng(self.config.seed).permutation(len(self.labels[split]))

    def fold(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of ``fold_split`` to train on (in the run's order) and to validate on (ascending), int64."""
        recipe, order = self.config.cross_validation, self.row_order(self.fold_split)
        scheme = "blocks" if recipe.scheme == "shuffled" else recipe.scheme
        train, validation = folds(len(order), recipe.n_folds, scheme)[number]
        if recipe.scheme == "shuffled":
            return order[train], np.sort(order[validation])
        members = np.zeros(len(order), bool)
        members[train] = True
        return order[members[order]], validation

    def trials(self) -> list[Trial]:
        """The sweep of this task, cut by target size, fold and ``settings_per_trial``."""
        made = []
        for target_size, settings in self._settings_by_target_size().items():
            size = self.config.resources.settings_per_trial or len(settings)
            packs = [settings[start : start + size] for start in range(0, len(settings), size)]
            for fold in range(self.config.cross_validation.n_folds):
                made += [self._trial(target_size, fold, pack) for pack in packs]
        return made

    def _settings_by_target_size(self) -> dict[int, list[Hyperparameters]]:
        grouped: dict[int, list[Hyperparameters]] = {}
        for method in self.config.methods:
            if METHODS[method].trains_backbone:
                continue
            for settings in self.config.search_space(method):
                grouped.setdefault(settings.target_size, []).append(settings)
        # Hyperparameters that share the scoring phase stay side by side when a trial holds only some.
        return {
            size: sorted(points, key=lambda s: (s.steps, s.learning_rate, s.coefficient))
            for size, points in sorted(grouped.items())
        }

    def _trial(self, target_size: int, fold: int, settings: list[Hyperparameters]) -> Trial:
        points = [asdict(point) for point in settings]
        name = f"target_size-{target_size}-fold-{fold}.parquet"
        file = self.file("trials", "frozen", name, self.training, self.config.cross_validation, fold, points)
        return Trial(self.task.name, fold, tuple(settings), file)

    @cached_property
    def training(self) -> list[object]:
        """What every head trained on frozen features depends on, beside its settings and seed."""
        config = self.config
        return [self.fingerprint, config.seed, config.batch_size, config.head_dtype]

    def head_file(self, settings: Hyperparameters, seed: int) -> str:
        """The file of the head of a method trained on all training images."""
        name = f"{settings.method}-seed-{seed}.safetensors"
        return self.file("heads", "frozen", name, self.training, asdict(settings), seed)


def backbone_folder(config: Config) -> str:
    """The backbone's name as it stands in paths."""
    return config.backbone.name.replace("/", "_").replace(":", "_")


def open_task(config: Config, name: str) -> TaskData:
    """Open the images of one task and read its labels.

    Raises UserError for images that are not there, an empty split, fewer images than folds, or bad rows where
    the recipe refuses them.
    """
    task, images = config.task(name), config.task_images(name)
    source = open_source(images.format, task, images.root, dict(images.options))
    others = config.cross_validation.images
    fold_source = open_source(others.format, task, others.root, dict(others.options)) if others else None
    splits: list[tuple[Split, ImageSource, Literal["train", "test"]]] = [
        ("train", source, "train"),
        ("test", source, "test"),
    ]
    if fold_source:
        splits.append(("folds", fold_source, "train"))
    labels = {split: np.asarray(images.labels(of), np.int32) for split, images, of in splits}
    for split, values in labels.items():
        if not len(values):
            raise UserError(f"task {name}: the {split} split is empty; expected at least one image")
    bad = [replace(row, split=split) for split, images, of in splits for row in check_rows(images, task, of)]
    if config.on_bad_image == "refuse":
        refuse_bad_rows(bad)
    work = TaskData(config, task, source, fold_source, labels, tuple(bad))
    work.fold(0)  # too few images for the folds are told now, not after the extraction
    return work


def open_tasks(config: Config) -> list[TaskData]:
    """Open every task of the recipe."""
    return [open_task(config, task.name) for task in config.tasks]


def refuse_bad_rows(rows: Iterable[BadRow]) -> None:
    """Raise one UserError that lists bad rows, if there are any."""
    bad = [f"{r.task}/{r.split} row {r.index} ({r.path}): {r.reason}" for r in rows]
    if bad:
        more = f"\n… and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise UserError(
            f"{len(bad)} bad images; mend them or set on_bad_image: skip\n" + "\n".join(bad[:20]) + more
        )
