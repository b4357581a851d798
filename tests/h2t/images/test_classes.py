"""Classes that cannot be meant are told before any work."""

import numpy as np
import pytest

from h2t.errors import UserError
from h2t.images.classes import check_classes
from h2t.tasks import Task, find_task

OWN = Task("birds", "birds", "other", 0, n_train=0)
FLOWERS = find_task("flowers")


def check(task: Task, names: str, train: list[int], test: list[int], *, stated: bool = False) -> None:
    labels = {"train": np.array(train), "test": np.array(test)}
    check_classes(task, tuple(names.split()), labels, stated=stated)


def test_classes_that_are_meant() -> None:
    check(OWN, "ant bee", [0, 1, 1], [1])
    check(OWN, "", [0, 1, 2, -1], [1])
    check(FLOWERS, "", [*range(100)], [*range(90)])
    check(FLOWERS, "", [0, 5, 7], [3])  # a few images of a known task
    check(FLOWERS, "ant bee", [0, 1], [0], stated=True)


@pytest.mark.parametrize(
    ("task", "names", "train", "test", "message"),
    [
        (OWN, "ant bee zebra", [0, 1], [2], "no training images of 1 of 3 classes \\('zebra'\\); add some"),
        (OWN, "ant bee zebra", [0, 1], [0], "no training images of 1 of 3 classes \\('zebra'\\); add some"),
        (OWN, "ant", [0, 0], [0], "two classes and more, got those of 1 \\(ant\\)"),
        (OWN, "", [0, 0], [0], "two classes and more, got those of 1 \\(0\\)"),
        (
            OWN,
            "",
            [1, 2, 3],
            [1, 2],
            "images of 1 of 4 classes \\(0\\); if the labels do not count",
        ),
        (
            OWN,
            "",
            [17, 9203] * 9,
            [17],
            "got 2 distinct ones up to 9203.*label_map, such as {17: cla",
        ),
        (OWN, "", [1440764, 2084071] * 9, [], "got 2 distinct ones up to 2084071"),
        (
            FLOWERS,
            "a b c d e",
            [*range(5)],
            [0],
            "VTAB with 102 .* have 5 \\(a, b, c, d, e\\); give",
        ),
        (FLOWERS, "", [0, 1] * 24, [0, 1], "Flowers102 of VTAB with 102 classes, but these images have 2;"),
    ],
)
def test_classes_that_cannot_be_meant(
    task: Task, names: str, train: list[int], test: list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(task, names, train, test)
