"""The tasks of a recipe with their images opened: labels, folds, and what identifies the images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from h2t.errors import UserError
from h2t.folds import folds
from h2t.images.classes import check_classes
from h2t.images.flipped import WithFlips
from h2t.images.formats import open_source
from h2t.images.source import BadRow, Image, ImageSource, SourceSplit, check_rows
from h2t.tasks import Task
from pipelines.config import Config, ImagesConfig

Split = Literal["train", "test", "folds"]  # "folds": other images for the cross-validation, where given


@dataclass(frozen=True)
class TaskData:
    """A task with its images opened; small enough to travel to every worker.

    ``sources``: by split, the source and what the split is called there; ``labels``: int32 [n] of each split;
    ``bad_rows``: rows without a usable label or file; ``left_out``: files among the images that are no rows.
    """

    config: Config
    task: Task
    sources: dict[Split, tuple[ImageSource, SourceSplit]]
    labels: dict[Split, np.ndarray]
    bad_rows: tuple[BadRow, ...] = ()
    left_out: tuple[BadRow, ...] = ()
    identities: dict[Split, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def fold_split(self) -> Split:
        """The split that is cut into folds."""
        return "folds" if "folds" in self.sources else "train"

    @property
    def stored_splits(self) -> list[Split]:
        """The splits whose features are stored."""
        return [split for split in self.sources if split != "test"]

    def read(self, split: Split, rows: Sequence[int]) -> list[Image]:
        """Images of some rows of a split, encoded or as pixels."""
        source, source_split = self.sources[split]
        return source.read(source_split, rows)

    def image_identity(self, split: Split) -> str:
        """Hexadecimal digits that change with the images and labels of a split, wherever they lie.

        Read once: a run's keys are those of the images as it found them.
        """
        if split not in self.identities:
            source, source_split = self.sources[split]
            self.identities[split] = source.identity(source_split)
        return self.identities[split]

    @cached_property
    def n_classes(self) -> int:
        """The number of classes: the task's, or one more than the highest label of any split."""
        if self.task.n_classes:
            return self.task.n_classes
        return max(int(labels.max(initial=0)) for labels in self.labels.values()) + 1

    def subset(self, split: Split, shots: int | None = None) -> np.ndarray:
        """Rows of a split, ascending int64: all, or ``shots`` of each class (fewer where it has no more).

        The run's seed draws them, and more shots hold those of fewer. Mirror images come beside theirs.
        """
        return self._with_flips(split, self._originals(split, shots))

    def _has_flips(self, split: Split) -> bool:
        """Whether the second half of a split's rows are the mirror images of the first."""
        source, name = self.sources[split]
        return isinstance(source, WithFlips) and name == "train"

    def _with_flips(self, split: Split, rows: np.ndarray) -> np.ndarray:
        if not self._has_flips(split):
            return rows
        return np.concatenate([rows, rows + len(self.labels[split]) // 2])

    def _originals(self, split: Split, shots: int | None) -> np.ndarray:
        """Rows of a split, or ``shots`` of each class, that are no mirror images, ascending int64."""
        labels = self.labels[split]
        if self._has_flips(split):
            labels = labels[: len(labels) // 2]
        if shots is None:
            return np.arange(len(labels))
        order = np.random.default_rng(self.config.seed).permutation(len(labels))
        classes = [order[labels[order] == label][:shots] for label in np.unique(labels[labels >= 0])]
        return np.sort(np.concatenate(classes))

    def n_folds(self, shots: int | None = None) -> int:
        """The number of folds: the recipe's, or that of the images where these are fewer."""
        return min(self.config.cross_validation.n_folds, len(self._originals(self.fold_split, shots)))

    def fold(self, number: int, shots: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows of ``fold_split``, or of its ``subset``, to train on and to validate on, ascending, int64.

        The scheme "shuffled" mixes the rows by the run's seed and cuts these into blocks, the others cut the
        order of the source: "blocks" is the paper's, with the first 1000 images of the original training set;
        "archive" has a VTAB-1k archive's 800 training images in four blocks and its 200 validation images as
        the fifth. Mirror images are trained on with theirs, and never validated on.

        Raises UserError for fewer images than folds.
        """
        rows, recipe = self._originals(self.fold_split, shots), self.config.cross_validation
        if recipe.scheme == "shuffled":
            rows = rows[np.random.default_rng(self.config.seed).permutation(len(rows))]
        n_folds = recipe.n_folds if shots is None else self.n_folds(shots)
        train, validation = folds(len(rows), n_folds)[number]
        return self._with_flips(self.fold_split, np.sort(rows[train])), np.sort(rows[validation])


def opened(images: ImagesConfig, task: Task) -> ImageSource:
    """The images of a task, as a recipe describes them."""
    source = open_source(images.format, task, images.root, dict(images.options))
    return WithFlips(source) if images.flips else source


def open_task(config: Config, name: str) -> TaskData:
    """Open the images of one task and read its labels.

    Raises UserError for images that are not there, an empty split, classes that cannot be meant, fewer images
    than folds, or bad rows where the recipe refuses them.
    """
    task, images = config.task(name), config.task_images(name)
    source = opened(images, task)
    sources: dict[Split, tuple[ImageSource, SourceSplit]] = {
        "train": (source, "train"), "test": (source, "test"),
    }  # fmt: skip
    if others := config.cross_validation.images:
        sources["folds"] = (opened(others, task), "train")
    labels = {split: np.asarray(source.labels(name), np.int32) for split, (source, name) in sources.items()}
    for split, values in labels.items():
        if not len(values):
            raise UserError(f"task {name}: the {split} split is empty; expected at least one image")
    bad = [
        replace(row, split=split)
        for split, (source, source_split) in sources.items()
        for row in check_rows(source, task, source_split)
    ]
    if config.on_bad_image == "refuse":
        refuse_bad_rows(bad)
    stated = config.task_settings(name).n_classes is not None
    check_classes(task, source.class_names(), labels, stated=stated)
    left_out = tuple(BadRow(name, "", file.index, file.path, file.reason) for file in source.left_out())
    data = TaskData(config, task, sources, labels, tuple(bad), left_out)
    data.fold(0)  # too few images for the folds are told now, not after the extraction
    return data


def refuse_bad_rows(rows: Iterable[BadRow]) -> None:
    """Raise one UserError that lists bad rows, if there are any."""
    bad = [f"{r.task}/{r.split} row {r.index} ({r.path}): {r.reason}" for r in rows]
    if bad:
        more = f"\n… and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise UserError(
            f"{len(bad)} bad images; fix them or set on_bad_image: skip\n" + "\n".join(bad[:20]) + more
        )
