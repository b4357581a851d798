"""A folder of images: a sub-folder per class, with or without a train/ and a test/ above them."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image as PillowImage
from pyarrow.fs import FileSystem, FileType

from h2t.images.held_out import HeldOut
from h2t.images.identity import content_identity
from h2t.images.lossy import describe_encoding
from h2t.images.remote import (
    list_files,
    list_folders,
    natural_order,
    no_such_split,
    open_root,
    read_files,
    require_root,
    task_folder,
)
from h2t.images.source import EncodedImage, FileSource, Image, RowProblem, SourceSplit, SourceUnavailable
from h2t.tasks import Task

_LAYOUT = "a folder with train/<class>/ and test/<class>/, or with <class>/ alone, of image files"
# Folders of these names side by side are parts of a data set and not its classes.
_USUAL_PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"}


@dataclass(frozen=True)
class FolderSource(FileSource):
    """Image files by class; labels are the places of the class names in natural order ('2' before '10').

    All images below the folder of a class are of it, however deep. Files of endings that Pillow does not know
    are no rows but told, and so are files beside the classes. Rows come sorted by path: shuffle them, since
    folds are consecutive blocks.
    """

    root: str
    folder: str  # within the root's file system
    task: Task
    held_out: HeldOut
    train: str = "train"  # the splits' folders
    test: str = "test"

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [n]."""
        return _rows(self, split)[1]

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Files as stored, of any format."""
        paths = [self.name(split, row) for row in rows]
        data = read_files(open_root(self.root)[0], paths)
        return [EncodedImage(content, path) for content, path in zip(data, paths, strict=True)]

    def name(self, split: SourceSplit, row: int) -> str:
        """The path of the image."""
        return _rows(self, split)[0][row]

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Links to nothing."""
        paths = _rows(self, split)[0]
        for row, info in enumerate(open_root(self.root)[0].get_file_info(paths)):
            if info.type == FileType.NotFound:
                yield RowProblem(row, info.path, "a link to nothing")

    def left_out(self) -> Iterator[RowProblem]:
        """Files that are no rows, with the reason."""
        folders = [self.folder]
        if _has_splits(self):
            folders = [f"{self.folder}/{getattr(self, split)}" for split in _splits(self)]
        return (file for folder in folders for file in _listed(self, folder).left_out)

    def provenance(self) -> dict[str, str]:
        """Root, and how the test images were chosen."""
        paths = _rows(self, "train")[0][:1]
        encoding = describe_encoding(b"".join(read_files(open_root(self.root)[0], paths)), self.task)
        rule = f"{self.train}/ and {self.test}/" if _has_splits(self) else str(self.held_out)
        return {
            "source": "folder",
            "root": self.root,
            "encoding": encoding,
            "rows": rule,
            "licence": self.task.licence,
        }

    def identity(self, split: SourceSplit) -> str:
        """The content of the images of a split."""
        paths, labels = _rows(self, split)
        return content_identity(open_root(self.root)[0], self.folder, paths, labels, self.class_names())

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order."""
        return _class_names(self)


def open_folder(
    task: Task,
    root: str | None,
    *,
    test_fraction: float = 0.2,
    seed: int = 0,
    train: str = "train",
    test: str = "test",
) -> FolderSource:
    """A task's images in a folder (or in a sub-folder of the task's name).

    Args:
        test_fraction: share of each class that is kept for testing where there is no folder ``test``.
        seed: of that choice.
        train: name of the folder of the training images.
        test: likewise of the test images.

    Raises:
        SourceUnavailable: nothing there, or folders of splits under other names.
        UserError: a share outside (0, 1), a negative seed, or a file name that is not UTF-8.
    """
    held_out = HeldOut(test_fraction, seed)
    root = require_root(root, task, _LAYOUT)
    filesystem, base = open_root(root)
    folder = base if train in list_folders(filesystem, base) else task_folder(root, task) or base
    _refuse_other_splits(filesystem, folder, train, test)
    source = FolderSource(root, folder, task, held_out, train, test)
    if not any(_rows(source, split)[0] for split in _splits(source)):
        raise SourceUnavailable(f"no folders of classes with images in {folder}: expected {_LAYOUT}")
    return source


def _refuse_other_splits(filesystem: FileSystem, folder: str, train: str, test: str) -> None:
    """Raise SourceUnavailable for splits of other names, which would be taken for classes."""
    found = list_folders(filesystem, folder)
    if train not in found and (test in found or (len(found) > 1 and _USUAL_PARTS.issuperset(found))):
        raise SourceUnavailable(
            f"{folder} holds the folders {', '.join(found)}: expected {train} and {test}. Say which of them "
            "are which with images.options.train and images.options.test (such as test: val), or give a "
            "folder of classes alone, of which a share is kept for testing"
        )
    for name in found if train not in found else []:
        if inner := _USUAL_PARTS.intersection(list_folders(filesystem, f"{folder}/{name}")):
            raise SourceUnavailable(
                f"{folder}/{name} holds a folder {min(inner)}, so it is no class: expected {_LAYOUT}"
            )


@lru_cache(maxsize=32)
def _class_names(source: FolderSource) -> tuple[str, ...]:
    filesystem, _ = open_root(source.root)
    if not _has_splits(source):
        return tuple(list_folders(filesystem, source.folder))
    names = {
        name
        for split in (source.train, source.test)
        for name in list_folders(filesystem, f"{source.folder}/{split}")
    }
    return tuple(sorted(names, key=natural_order))


def _has_splits(source: FolderSource) -> bool:
    return source.train in list_folders(open_root(source.root)[0], source.folder)


def _splits(source: FolderSource) -> list[SourceSplit]:
    """The splits that are there: the folds of a cross-validation may have training images alone."""
    found = list_folders(open_root(source.root)[0], source.folder)
    return ["train"] if source.train in found and source.test not in found else ["train", "test"]


# Asked for every row that is read.
@lru_cache(maxsize=64)
def _rows(source: FolderSource, split: SourceSplit) -> tuple[list[str], np.ndarray]:
    """Paths and labels of a split."""
    if _has_splits(source):
        if split not in _splits(source):
            found = list_folders(open_root(source.root)[0], source.folder)
            raise no_such_split(found, source.folder, split, getattr(source, split))
        listed = _listed(source, f"{source.folder}/{getattr(source, split)}")
        return listed.paths, listed.labels
    listed = _listed(source, source.folder)
    chosen = source.held_out.rows(listed.labels, split)
    return [listed.paths[row] for row in chosen], listed.labels[chosen]


@dataclass(frozen=True)
class _Listed:
    """Images below the folders of the classes and their labels, and what else is there."""

    paths: list[str]
    labels: np.ndarray
    left_out: list[RowProblem]


@lru_cache(maxsize=64)
def _listed(source: FolderSource, folder: str) -> _Listed:
    filesystem, _ = open_root(source.root)
    paths: list[str] = []
    labels: list[int] = []
    beside = list_files(filesystem, folder, recursive=False)
    left_out = [RowProblem(-1, path, "left out: not in the folder of a class") for path in beside]
    for label, name in enumerate(_class_names(source)):
        for path in list_files(filesystem, f"{folder}/{name}"):
            ending = posixpath.splitext(path)[1].lower()
            if ending in image_endings():
                paths.append(path)
                labels.append(label)
            else:
                reason = f"left out: '{ending}' is no ending of an image file that Pillow reads"
                left_out.append(RowProblem(-1, path, reason))
    return _Listed(paths, np.array(labels, dtype=np.int32), left_out)


@cache
def image_endings() -> frozenset[str]:
    """Endings of the files that Pillow reads, in lower case and with the dot."""
    readable = PillowImage.registered_extensions().items()
    return frozenset(ending for ending, format in readable if format in PillowImage.OPEN)
