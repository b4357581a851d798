"""What of VTAB-1k is at a root, what is missing, and how to get it."""

from dataclasses import dataclass
from typing import Literal

from h2t.errors import UserError, unknown
from h2t.images.formats import FORMATS, ROOTED, open_source
from h2t.images.remote import require_root
from h2t.images.source import ImageSource, SourceSplit, SourceUnavailable, check_rows
from h2t.tasks import VTAB_1K, Task

Status = Literal["ready", "incomplete", "missing"]

_SPLITS: tuple[SourceSplit, ...] = ("train", "test")


@dataclass(frozen=True)
class TaskReadiness:
    """What is there of one task; numbers of images as 'training + test'."""

    task: str
    status: Status
    found: str
    expected: str
    advice: str  # what is wrong and how to get what is missing; empty where ready


def check_root(root: str, format: str) -> list[TaskReadiness]:
    """The state of each of the 19 tasks, in the paper's order; looks for every image but opens none.

    Raises:
        UserError: a format that is not kept at a root, or nothing at ``root``.
    """
    if format not in ROOTED:
        raise unknown("image format", format, ROOTED)
    require_root(root, VTAB_1K[0], "the folder that holds the tasks")
    return [_check(task, root, format) for task in VTAB_1K]


def _check(task: Task, root: str, format: str) -> TaskReadiness:
    expected = f"{task.n_train} + {task.n_test}"
    how = FORMATS[format].advice.format(folder=task.folder, name=task.name)
    try:
        source = open_source(format, task, root, {})
    except SourceUnavailable:
        return TaskReadiness(task.name, "missing", "nothing", expected, how)
    states = [_check_split(source, task, split) for split in _SPLITS]
    faults = [fault for _, fault in states if fault]
    found = " + ".join(str(n_images) for n_images, _ in states)
    if not faults:
        return TaskReadiness(task.name, "ready", found, expected, "")
    advice = faults if faults == [_whole_training_set(task)] else [*faults, how]
    return TaskReadiness(task.name, "incomplete", found, expected, "; ".join(advice))


def _check_split(source: ImageSource, task: Task, split: SourceSplit) -> tuple[int, str]:
    """Number of images, and what is wrong with them in words."""
    try:
        n_images = len(source.labels(split))
        bad = check_rows(source, task, split)
    except UserError as error:
        return 0, str(error)
    expected = task.n_train if split == "train" else task.n_test
    if n_images and bad:
        first = f"{bad[0].path}: {bad[0].reason}" if bad[0].path else bad[0].reason
        return n_images, f"{len(bad)} bad rows in {split}, first {first}"
    if split == "train" and n_images > expected:
        return n_images, _whole_training_set(task)
    return n_images, "" if n_images == expected else f"{split} has {n_images} of {expected} images"


def _whole_training_set(task: Task) -> str:
    return f"whole training set: use the options shuffle: 0 and n_train: {task.n_train}"
