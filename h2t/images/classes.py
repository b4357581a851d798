"""Whether the classes that a source shows are those of its task; told before any work."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from h2t.errors import UserError
from h2t.tasks import Task

_SHOWN = 10  # class names or labels in a message


def check_classes(
    task: Task, class_names: tuple[str, ...], labels: Mapping[Any, np.ndarray], *, stated: bool = False
) -> None:
    """Raise UserError for classes that cannot be meant.

    Args:
        class_names: in label order; none where the source has none.
        labels: of every split, integer [n]; negative ones are bad rows and left alone.
        stated: whether the user gave the number of classes, so that it may differ from a known task's.
    """
    used = {split: np.unique(values[values >= 0]) for split, values in labels.items()}
    found = np.unique(np.concatenate(list(used.values())))
    n_rows = sum(map(len, labels.values()))
    if task.known and not stated:
        _check_known(task, class_names, len(found), n_rows)
    if not class_names and not task.n_classes and _are_ids(found, n_rows):
        raise UserError(_label_map_needed(task, found))
    if len(used["train"]) < 2:
        names = [class_names[label] for label in used["train"]] if class_names else used["train"].tolist()
        raise UserError(
            f"task {task.name}: expected training images of two classes and more, got those of "
            f"{len(used['train'])}" + (f" ({names[0]})" if names else "")
        )
    if not task.known:
        _check_every_class(task, class_names, used["train"], found)


def _check_known(task: Task, class_names: tuple[str, ...], n_found: int, n_rows: int) -> None:
    # Some rare classes may be in no split of a data set; half of them hardly.
    fits = len(class_names) == task.n_classes if class_names else 2 * n_found >= min(task.n_classes, n_rows)
    if not fits:
        raise UserError(
            f"task {task.name} is {task.title} of VTAB with {task.n_classes} classes, but these images have "
            f"{len(class_names) or n_found}{_listed(class_names)}; give a task of your own a group (such as "
            "'group: other'), or state n_classes"
        )


def _are_ids(found: np.ndarray, n_rows: int) -> bool:
    """Whether labels count nothing: more than half of those up to the highest never occur."""
    return bool(len(found)) and 2 * len(found) < min(int(found[-1]) + 1, n_rows)


def _label_map_needed(task: Task, found: np.ndarray) -> str:
    shown = found[:_SHOWN].tolist()
    pairs = ", ".join(f"{label}: class{place}" for place, label in enumerate(shown))
    more = ", …" if len(found) > _SHOWN else ""
    return (
        f"task {task.name}: expected labels that count the classes from 0, got {len(found)} distinct ones up "
        f"to {found[-1]}. Say what they mean with images.options.label_map, such as {{{pairs}{more}}}, or "
        "take them in ascending order with label_map: compact"
    )


def _check_every_class(
    task: Task, class_names: tuple[str, ...], train: np.ndarray, found: np.ndarray
) -> None:
    n_classes = task.n_classes or len(class_names) or int(found[-1]) + 1
    absent = np.setdiff1d(np.arange(n_classes), train)
    if not len(absent):
        return
    if class_names:
        names = [f"'{class_names[label]}'" for label in absent if label < len(class_names)]
        hint = "add some, remove the class" + (", or raise n_train" if len(found) > len(train) else "")
    else:
        names = [str(label) for label in absent]
        hint = "if the labels do not count from 0, use images.options.label_map: compact"
    raise UserError(
        f"task {task.name}: no training images of {len(absent)} of {n_classes} classes"
        f"{_listed(names)}; {hint}"
    )


def _listed(names: tuple[str, ...] | list[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
