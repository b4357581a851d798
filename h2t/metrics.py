"""Accuracy of predictions, and the summaries of it that the paper prints."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from h2t.errors import UserError

OFFICIAL_BATCH = 50


class Summary(NamedTuple):
    """Median and sample standard deviation over ``n`` seeds; the deviation of one seed is NaN."""

    median: float
    std: float
    n: int


def correct(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> int:
    """Number of rows whose prediction is the label.

    ``labels``, ``predictions``: integer [n]. Raises UserError on no rows or unequal lengths.
    """
    truth, guess = np.asarray(labels), np.asarray(predictions)
    if truth.ndim != 1 or truth.shape != guess.shape or truth.size == 0:
        raise UserError(
            "accuracy: expected labels and predictions of one length of at least 1, "
            f"got shapes {truth.shape} and {guess.shape}"
        )
    return int(np.count_nonzero(truth == guess))


def accuracy(labels: npt.ArrayLike, predictions: npt.ArrayLike) -> float:
    """Share of rows whose prediction is the label: correct / n. Arguments and errors as for ``correct``."""
    return correct(labels, predictions) / len(np.asarray(labels))


def cross_entropy(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean over rows of minus the log-probability of the label; float64 throughout.

    ``logits``: float [n, n_classes]; ``labels``: integer [n].
    """
    truth = np.asarray(labels)
    log_probabilities = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    return float(-log_probabilities[np.arange(len(truth)), truth].mean())


def official_accuracy(n_correct: int, n: int) -> float:
    """Accuracy as the authors' code has it: the mean over batches of 50, a short last one counted as full.

    Understates whenever 50 does not divide ``n`` (KITTI's 711 images: by a factor of 0.948), so it serves
    for comparison with published figures alone.
    """
    return n_correct / padded_size(n)


def padded_size(n: int) -> int:
    """``n`` rounded up to whole batches of 50: what the authors' code divides by."""
    if n < 1:
        raise UserError(f"accuracy: expected at least 1 row, got {n}")
    return OFFICIAL_BATCH * math.ceil(n / OFFICIAL_BATCH)


def median_and_std(values: npt.ArrayLike) -> Summary:
    """Median (Table 1) and sample standard deviation (Table 4) of ``values``, float [n_seeds].

    The divisor is n - 1: the paper's deviations on KITTI, whose accuracies are multiples of 1/750, can be
    had from three seeds only so. NaN entries (failed seeds) are left out.
    """
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[~np.isnan(finite)]
    if finite.size == 0:
        return Summary(math.nan, math.nan, 0)
    std = float(np.std(finite, ddof=1)) if finite.size > 1 else math.nan
    return Summary(float(np.median(finite)), std, int(finite.size))


def group_means(values: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """Mean of ``values`` (task -> value) over each group's tasks, and under ``"all"`` over all tasks.

    The overall mean weighs every task alike, as in Table 1: it is not the mean of the group means.
    """
    members: dict[str, list[float]] = {}
    for task, value in values.items():
        members.setdefault(groups[task], []).append(value)
    means = {group: float(np.mean(accuracies)) for group, accuracies in members.items()}
    return means | ({"all": float(np.mean(list(values.values())))} if values else {})


def domain_affinity(linear: Mapping[str, float], scratch: Mapping[str, float]) -> dict[str, float]:
    """Accuracy of ``linear`` minus that of ``scratch`` per task (section 2), lowest first.

    Low means far from the source domain. Tasks that one of the two lacks are left out.
    """
    affinity = {task: linear[task] - scratch[task] for task in linear if task in scratch}
    return dict(sorted(affinity.items(), key=lambda item: item[1]))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation of two sequences of one length.

    NaN where one of them is constant or shorter than 3.
    """
    from scipy.stats import spearmanr  # takes a second to import, and every worker imports this file

    if len(first) != len(second):
        raise UserError(f"spearman: expected sequences of one length, got {len(first)} and {len(second)}")
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return math.nan
    return float(spearmanr(first, second).statistic)
