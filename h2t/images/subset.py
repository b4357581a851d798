"""Another order, a part, or other labels of a source's rows."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from h2t.errors import UserError
from h2t.images.source import Image, ImageSource, RowProblem, SourceSplit

COMPACT = "compact"


@dataclass(frozen=True)
class ArrangedSource:
    """A source's rows, shuffled by a seed unless that is None, and of those the first so many (0 = all).

    ``stored_labels``: the labels as they are stored, in the order of the classes 0, 1, …; none where the
    stored ones are that already. ``names``: of the classes, where given.
    """

    source: ImageSource
    shuffle: int | None
    n_train: int
    n_test: int
    stored_labels: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [n], -1 also for a stored label that is not in the map."""
        stored = self.source.labels(split)[_order(self, split)]
        return _mapped(stored, self.stored_labels) if self.stored_labels else stored

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Images of rows in the new order."""
        return self.source.read(split, _order(self, split)[list(rows)].tolist())

    def name(self, split: SourceSplit, row: int) -> str:
        """The source's name of the row."""
        return self.source.name(split, int(_order(self, split)[row]))

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Problems of the chosen rows, with their new indices."""
        order = _order(self, split)
        new_index = {int(old): new for new, old in enumerate(order)}
        for problem in self.source.problems(split):
            if problem.index in new_index:
                yield replace(problem, index=new_index[problem.index])
        if self.stored_labels:
            stored = self.source.labels(split)[order]
            for row in np.flatnonzero((self.labels(split) < 0) & (stored >= 0)).tolist():
                yield RowProblem(row, self.name(split, row), f"label {stored[row]} is not in label_map")

    def left_out(self) -> Iterator[RowProblem]:
        """The source's."""
        return self.source.left_out()

    def class_names(self) -> tuple[str, ...]:
        """The map's, else the source's."""
        return self.names or self.source.class_names()

    def identity(self, split: SourceSplit) -> str:
        """The source's, the new order and the new labels."""
        arranged = _order(self, split).tobytes() + str(self.stored_labels or "").encode()
        return f"{self.source.identity(split)}-{hashlib.sha256(arranged).hexdigest()}"

    def provenance(self) -> dict[str, str]:
        """The source's, and the new order."""
        order = "as stored" if self.shuffle is None else f"shuffled, seed {self.shuffle}"
        limits = {"n_train": self.n_train, "n_test": self.n_test}
        parts = [f"first {limit} of {name[2:]}" for name, limit in limits.items() if limit]
        return {**self.source.provenance(), "order": ", ".join([order, *parts])}


def arrange(
    source: ImageSource,
    *,
    shuffle: int | None = None,
    n_train: int = 0,
    n_test: int = 0,
    label_map: dict | str | None = None,
) -> ImageSource:
    """The source itself, or its rows in another order or number, or with other labels.

    Args:
        shuffle: seed of the new order; None keeps the source's.
        n_train: how many training rows to use, the first in the new order; 0 = all.
        n_test: likewise for the test rows.
        label_map: what the stored labels mean, as {stored label: class name}; the classes are in its order.
            "compact" takes the labels that occur, in ascending order.

    Raises:
        UserError: a negative number, or a map of something else. More rows than there are raise it when they
            are first counted.
    """
    for name, value in (("shuffle", shuffle), ("n_train", n_train), ("n_test", n_test)):
        if value is not None and value < 0:
            raise UserError(f"{name}: expected 0 or more, got {value}")
    if shuffle is None and not n_train and not n_test and label_map is None:
        return source
    stored, names = _parsed(label_map, source) if label_map is not None else ((), ())
    return ArrangedSource(source, shuffle, n_train, n_test, stored, names)


def _parsed(
    label_map: Mapping[object, object] | str, source: ImageSource
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The stored labels and the names of their classes."""
    if label_map == COMPACT:
        found = np.union1d(source.labels("train"), source.labels("test"))
        stored = tuple(found[found >= 0].tolist())
        return stored, tuple(map(str, stored))
    if isinstance(label_map, str) or len(label_map) < 2:
        raise UserError(f"label_map: expected '{COMPACT}' or two classes and more, got {label_map!r}")
    keys = [str(key) for key in label_map]  # of a recipe, which becomes JSON, they are text
    wrong = [key for key in keys if not key.isdecimal() or int(key) > np.iinfo(np.int32).max]
    if wrong:
        raise UserError(f"label_map: expected stored labels (integers) as keys, got '{wrong[0]}'")
    return tuple(map(int, keys)), tuple(str(name) for name in label_map.values())


def _mapped(stored: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    """int32 [n]: the place of each stored label in ``values``, -1 where it is not there."""
    ascending = np.argsort(values)
    place = np.searchsorted(values, stored, sorter=ascending).clip(max=len(values) - 1)
    classes = ascending[place]
    return np.where(np.asarray(values)[classes] == stored, classes, -1).astype(np.int32)


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
