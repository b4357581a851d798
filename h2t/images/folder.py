"""A folder of images: a sub-folder per class, with or without a train/ and a test/ above them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from h2t.errors import UserError
from h2t.images.identity import content_identity
from h2t.images.lossy import describe_encoding
from h2t.images.remote import (
    list_files,
    list_folders,
    natural_order,
    open_root,
    read_files,
    require_root,
    task_folder,
)
from h2t.images.source import EncodedImage, FileSource, Image, RowProblem, SourceSplit, SourceUnavailable
from h2t.tasks import Task

_LAYOUT = "a folder with train/<class>/ and test/<class>/, or with <class>/ alone, of image files"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class FolderSource(FileSource):
    """Image files by class; labels are the places of the class names in natural order ('2' before '10').

    Files of other suffixes than images' are no rows. Rows come sorted by path: shuffle them, since folds
    are consecutive blocks.
    """

    root: str
    folder: str  # within the root's file system
    task: Task
    test_fraction: float
    seed: int

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [n]."""
        return _rows(self)[split][1]

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Files as stored, of any format."""
        paths = [self.name(split, row) for row in rows]
        data = read_files(open_root(self.root)[0], paths)
        return [EncodedImage(content, path) for content, path in zip(data, paths, strict=True)]

    def name(self, split: SourceSplit, row: int) -> str:
        """The path of the image."""
        return _rows(self)[split][0][row]

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Nothing: rows are the files that were found."""
        return iter(())

    def provenance(self) -> dict[str, str]:
        """Root, and how the test images were chosen."""
        paths = _rows(self)["train"][0][:1]
        encoding = describe_encoding(b"".join(read_files(open_root(self.root)[0], paths)), self.task)
        rule = (
            "train/ and test/" if _has_splits(self) else f"{self.test_fraction} for testing, seed {self.seed}"
        )
        return {
            "source": "folder",
            "root": self.root,
            "encoding": encoding,
            "rows": rule,
            "licence": self.task.licence,
        }

    def identity(self, split: SourceSplit) -> str:
        """The content of the images of a split."""
        paths, labels = _rows(self)[split]
        return content_identity(open_root(self.root)[0], self.folder, paths, labels, self.class_names())

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order."""
        return _class_names(self)


def open_folder(task: Task, root: str | None, *, test_fraction: float = 0.2, seed: int = 0) -> FolderSource:
    """A task's images in a folder (or in a sub-folder of the task's name).

    Args:
        test_fraction: share of each class that is kept for testing where there is no ``test/``.
        seed: of that choice.

    Raises:
        SourceUnavailable: nothing there.
        UserError: a share outside (0, 1), or a negative seed.
    """
    if not 0 < test_fraction < 1:
        raise UserError(f"test_fraction: expected a number between 0 and 1, got {test_fraction}")
    if seed < 0:
        raise UserError(f"seed: expected 0 or more, got {seed}")
    root = require_root(root, task, _LAYOUT)
    filesystem, base = open_root(root)
    folder = base if "train" in list_folders(filesystem, base) else task_folder(root, task) or base
    source = FolderSource(root, folder, task, test_fraction, seed)
    if not any(paths for paths, _ in _rows(source).values()):
        raise SourceUnavailable(f"no folders of classes with images in {folder}: expected {_LAYOUT}")
    return source


@lru_cache(maxsize=32)
def _class_names(source: FolderSource) -> tuple[str, ...]:
    filesystem, _ = open_root(source.root)
    if not _has_splits(source):
        return tuple(list_folders(filesystem, source.folder))
    names = {
        name for split in ("train", "test") for name in list_folders(filesystem, f"{source.folder}/{split}")
    }
    return tuple(sorted(names, key=natural_order))


def _has_splits(source: FolderSource) -> bool:
    return "train" in list_folders(open_root(source.root)[0], source.folder)


@lru_cache(maxsize=32)
def _rows(source: FolderSource) -> dict[SourceSplit, tuple[list[str], np.ndarray]]:
    """Paths and labels of both splits."""
    if _has_splits(source):
        return {
            "train": _listed(source, f"{source.folder}/train"),
            "test": _listed(source, f"{source.folder}/test"),
        }
    paths, labels = _listed(source, source.folder)
    for_testing = _chosen_for_testing(labels, source.test_fraction, source.seed)
    return {
        "train": (
            [path for path, test in zip(paths, for_testing, strict=True) if not test],
            labels[~for_testing],
        ),
        "test": ([path for path, test in zip(paths, for_testing, strict=True) if test], labels[for_testing]),
    }


def _listed(source: FolderSource, folder: str) -> tuple[list[str], np.ndarray]:
    filesystem, _ = open_root(source.root)
    of_class = [
        list_files(filesystem, f"{folder}/{name}", _SUFFIXES, recursive=False)
        for name in _class_names(source)
    ]
    labels = np.repeat(np.arange(len(of_class), dtype=np.int32), [len(paths) for paths in of_class])
    return [path for paths in of_class for path in paths], labels


def _chosen_for_testing(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [n]: of every class the rounded share of its images, at random."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[generator.permutation(rows)[: round(fraction * len(rows))]] = True
    return chosen
