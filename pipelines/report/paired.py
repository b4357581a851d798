"""What the test images say of methods and their differences, from the predictions of runs."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from h2t.statistics import Estimate, accuracy_estimate, paired_difference

Correctness = Mapping[tuple[str, str], Mapping[str, np.ndarray]]
"""(backbone, task) -> method -> bool [n_seeds, n_images]: seeds ascending, images by index."""


def correctness(predictions: pd.DataFrame) -> Correctness:
    """Which predictions are right, of all trainings that ended well.

    Of methods that were not tested on the same images as the first of their task, nothing is said.
    """
    ended = predictions[predictions["prediction"] >= 0]
    right = ended.assign(right=ended["label"] == ended["prediction"])
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    images: dict[tuple[str, str], pd.Index] = {}
    for (backbone, task, method), rows in right.groupby(["backbone", "task", "method"], sort=False):
        table = rows.pivot(index="seed", columns="index", values="right").dropna()
        key = str(backbone), str(task)
        if table.columns.equals(images.setdefault(key, table.columns)):
            found.setdefault(key, {})[str(method)] = table.to_numpy(bool)
    return found


def intervals(found: Correctness) -> dict[tuple[str, str, str], Estimate]:
    """(backbone, method, task) -> its accuracy, with the interval that covers test images and seeds."""
    return {
        (backbone, method, task): accuracy_estimate(values)
        for (backbone, task), methods in found.items()
        for method, values in methods.items()
    }


def not_worse_than_best(
    found: Correctness, medians: Mapping[tuple[str, str, str], float]
) -> set[tuple[str, str, str]]:
    """(backbone, method, task) of all that the best method of a task does not beat by more than chance.

    ``medians``: what the best is judged by, with the same keys. The best itself is not among them.
    """
    close = set()
    for (backbone, task), methods in found.items():
        best = max(methods, key=lambda method: medians.get((backbone, method, task), -np.inf))
        for method, values in methods.items():
            if method != best and paired_difference(methods[best], values).low <= 0:
                close.add((backbone, method, task))
    return close
