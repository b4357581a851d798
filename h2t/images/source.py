"""What an image source promises, and what can be wrong with an image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from h2t.errors import UserError

Split = Literal["train", "test"]


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

    def labels(self, split: Split) -> np.ndarray:
        """int32 [n] in row order; the index of a row is its position, -1 where the label is unreadable."""
        ...

    def read(self, split: Split, rows: Sequence[int]) -> list[Image]:
        """Images of any rows in any order."""
        ...

    def name(self, split: Split, row: int) -> str:
        """What to call a row in messages: its path, where it has one."""
        ...

    def problems(self, split: Split) -> Iterator[RowProblem]:
        """Rows whose label or file cannot be had, found without opening an image."""
        ...

    def provenance(self) -> dict[str, str]:
        """Where the images come from: ``source``, and ``root``, ``encoding``, ``licence`` where known."""
        ...


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
