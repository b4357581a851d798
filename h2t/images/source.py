"""What an image source promises, and what can be wrong with an image."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from h2t.errors import UserError
from h2t.tasks import Task

SourceSplit = Literal["train", "test"]


@dataclass(frozen=True)
class EncodedImage:
    """An image as stored (PNG, JPEG, WebP …); no bytes at all stand for a file that is not there."""

    data: bytes
    path: str


Image = EncodedImage | np.ndarray
"""Encoded, or decoded already: uint8 [height, width, 3]."""


@dataclass(frozen=True)
class RowProblem:
    """What a source knows to be wrong with one of its rows without decoding it."""

    index: int
    path: str
    reason: str


class ImageSource(Protocol):
    """Labelled images in a fixed order; small and cheap to pickle (paths and settings, never pixels)."""

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [n] in row order; the index of a row is its position, -1 where the label is unreadable."""
        ...

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Images of any rows in any order."""
        ...

    def name(self, split: SourceSplit, row: int) -> str:
        """What to call a row in messages: its path, where it has one."""
        ...

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Rows whose label or file cannot be had, found without opening an image."""
        ...

    def left_out(self) -> Iterator[RowProblem]:
        """Files among the images that are no rows, of index -1."""
        ...

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order; none where the source has none."""
        ...

    def identity(self, split: SourceSplit) -> str:
        """Hexadecimal digits that change with the images and labels of a split, wherever they lie."""
        ...

    def provenance(self) -> dict[str, str]:
        """Where the images come from: ``source``, and ``root``, ``encoding``, ``licence`` where known."""
        ...


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """A source of files, which are listed once in a process for all that it is asked to read.

    ``opened``: makes every opening list them anew.
    """

    opened: int = field(default_factory=time.time_ns)

    def left_out(self) -> Iterator[RowProblem]:
        """Nothing, unless a source finds other files where its images lie."""
        return iter(())

    def class_names(self) -> tuple[str, ...]:
        """None, unless a source knows them: labels are numbers."""
        return ()


class SourceUnavailable(UserError):
    """The images of a task cannot be had here; the message says how to get them."""


class BadImage(ValueError):
    """An image that cannot be decoded to uint8 RGB."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used, or a whole split (index -1)."""

    task: str
    split: str
    index: int
    path: str
    reason: str


def check_rows(source: ImageSource, task: Task, split: SourceSplit) -> list[BadRow]:
    """Rows without a usable label or file, one entry each; an empty split is a row of index -1."""
    labels = source.labels(split)
    if not len(labels):
        return [BadRow(task.name, split, -1, source.provenance().get("root", ""), "the split has no images")]
    bad: dict[int, BadRow] = {}
    for problem in source.problems(split):
        bad.setdefault(problem.index, BadRow(task.name, split, problem.index, problem.path, problem.reason))
    for row in _out_of_range(labels, task.n_classes):
        bad.setdefault(
            row, BadRow(task.name, split, row, source.name(split, row), _reason(labels[row], task))
        )
    return [bad[row] for row in sorted(bad)]


def _out_of_range(labels: np.ndarray, n_classes: int) -> list[int]:
    too_high = labels >= n_classes if n_classes else np.zeros(len(labels), dtype=bool)
    return np.flatnonzero((labels < 0) | too_high).tolist()


def _reason(label: int, task: Task) -> str:
    expected = f"0 to {task.n_classes - 1}" if task.n_classes else "0 or more"
    return f"label {label} is out of range: expected {expected}"
