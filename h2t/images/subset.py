"""Another order or a part of a source's rows."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from h2t.errors import UserError
from h2t.images.source import Image, ImageSource, RowProblem, SourceSplit


@dataclass(frozen=True)
class ArrangedSource:
    """A source's rows, shuffled by a seed unless that is None, and of those the first so many (0 = all)."""

    source: ImageSource
    shuffle: int | None
    n_train: int
    n_test: int

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [n]."""
        return self.source.labels(split)[_order(self, split)]

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Images of rows in the new order."""
        return self.source.read(split, _order(self, split)[list(rows)].tolist())

    def name(self, split: SourceSplit, row: int) -> str:
        """The source's name of the row."""
        return self.source.name(split, int(_order(self, split)[row]))

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Problems of the chosen rows, with their new indices."""
        new_index = {int(old): new for new, old in enumerate(_order(self, split))}
        for problem in self.source.problems(split):
            if problem.index in new_index:
                yield replace(problem, index=new_index[problem.index])

    def class_names(self) -> tuple[str, ...]:
        """The source's."""
        return self.source.class_names()

    def identity(self, split: SourceSplit) -> str:
        """The source's, and the new order."""
        order = hashlib.sha256(_order(self, split).tobytes()).hexdigest()
        return f"{self.source.identity(split)}-{order}"

    def provenance(self) -> dict[str, str]:
        """The source's, and the new order."""
        order = "as stored" if self.shuffle is None else f"shuffled, seed {self.shuffle}"
        limits = {"n_train": self.n_train, "n_test": self.n_test}
        parts = [f"first {limit} of {name[2:]}" for name, limit in limits.items() if limit]
        return {**self.source.provenance(), "order": ", ".join([order, *parts])}


def arrange(
    source: ImageSource, *, shuffle: int | None = None, n_train: int = 0, n_test: int = 0
) -> ImageSource:
    """The source itself, or its rows in another order or number.

    Args:
        shuffle: seed of the new order; None keeps the source's.
        n_train: how many training rows to use, the first in the new order; 0 = all.
        n_test: likewise for the test rows.

    Raises:
        UserError: a negative number. More rows than there are raise it when they are first counted.
    """
    for name, value in (("shuffle", shuffle), ("n_train", n_train), ("n_test", n_test)):
        if value is not None and value < 0:
            raise UserError(f"{name}: expected 0 or more, got {value}")
    if shuffle is None and not n_train and not n_test:
        return source
    return ArrangedSource(source, shuffle, n_train, n_test)


@lru_cache(maxsize=32)
def _order(arranged: ArrangedSource, split: SourceSplit) -> np.ndarray:
    """Old index of each new row, int64."""
    n_rows = len(arranged.source.labels(split))
    order = np.arange(n_rows)
    if arranged.shuffle is not None:
        # Two streams: the order of one split says nothing about the other's.
        order = np.random.default_rng([arranged.shuffle, split == "test"]).permutation(n_rows)
    limit = arranged.n_train if split == "train" else arranged.n_test
    if limit > n_rows:
        raise UserError(f"n_{split}: expected at most the {n_rows} images that there are, got {limit}")
    return order[:limit] if limit else order
