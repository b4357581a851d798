"""Training images beside their mirror images, for tasks whose labels do not change with them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from h2t.images.preprocessing import decode
from h2t.images.source import BadImage, Image, ImageSource, RowProblem, SourceSplit


@dataclass(frozen=True)
class WithFlips:
    """A source whose training split has every image twice: after all of them come their mirror images.

    Row ``n + i`` is row ``i`` with left and right exchanged; other splits are as they are.
    """

    source: ImageSource

    @cached_property
    def _n_train(self) -> int:
        return len(self.source.labels("train"))

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [2n] of the training split."""
        labels = self.source.labels(split)
        return np.concatenate([labels, labels]) if split == "train" else labels

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Images of any rows in any order; mirror images as pixels uint8 [height, width, 3]."""
        if split != "train":
            return self.source.read(split, rows)
        n_rows = self._n_train
        images = self.source.read(split, [row % n_rows for row in rows])
        return [image if row < n_rows else _flipped(image) for row, image in zip(rows, images, strict=True)]

    def name(self, split: SourceSplit, row: int) -> str:
        """That of the image, of which the mirror image says so."""
        if split != "train" or row < self._n_train:
            return self.source.name(split, row)
        return f"{self.source.name(split, row - self._n_train)} (flipped)"

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Those of the source; what is wrong with an image is wrong with its mirror image."""
        for problem in self.source.problems(split):
            yield problem
            if split == "train":
                yield replace(problem, index=self._n_train + problem.index)

    def left_out(self) -> Iterator[RowProblem]:
        """As the source has it."""
        return self.source.left_out()

    def class_names(self) -> tuple[str, ...]:
        """As the source has them."""
        return self.source.class_names()

    def identity(self, split: SourceSplit) -> str:
        """Another one than the source's for the training split."""
        identity = self.source.identity(split)
        return hashlib.sha256(f"{identity} flipped".encode()).hexdigest() if split == "train" else identity

    def provenance(self) -> dict[str, str]:
        """As the source has it."""
        return self.source.provenance()


def _flipped(image: Image) -> Image:
    """The mirror image; what is no image stays as it is, and is told when its turn comes."""
    try:
        return np.ascontiguousarray(decode(image)[:, ::-1])
    except BadImage:
        return image
