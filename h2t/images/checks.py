"""What can be known to be wrong before an image is decoded."""

from dataclasses import dataclass

import numpy as np

from h2t.errors import UserError
from h2t.images.source import ImageSource, Split
from h2t.tasks import Task


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used, or a whole split (index -1)."""

    task: str
    split: str
    index: int
    path: str
    reason: str


def check_rows(source: ImageSource, task: Task, split: Split) -> list[BadRow]:
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


def count_classes(source: ImageSource) -> int:
    """One more than the highest label of both splits, for a task that does not state its classes.

    Raises:
        UserError: neither split has a label.
    """
    highest = max(
        (int(labels.max()) for split in ("train", "test") if len(labels := source.labels(split))), default=-1
    )
    if highest < 0:
        raise UserError(f"cannot count the classes: no labels in {source.provenance()}")
    return highest + 1


def _out_of_range(labels: np.ndarray, n_classes: int) -> list[int]:
    too_high = labels >= n_classes if n_classes else np.zeros(len(labels), dtype=bool)
    return np.flatnonzero((labels < 0) | too_high).tolist()


def _reason(label: int, task: Task) -> str:
    expected = f"0 to {task.n_classes - 1}" if task.n_classes else "0 or more"
    return f"label {label} is out of range: expected {expected}"
