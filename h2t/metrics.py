"""Accuracy of predictions, and the summaries of it that the paper prints."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, softmax

from h2t.errors import UserError

OFFICIAL_BATCH = 50
CALIBRATION_BINS = 15


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


class Scores(NamedTuple):
    """What is known of each prediction: the class int32 [n], and probabilities float32 [n].

    ``probability`` is that of the predicted class, ``label_probability`` that of the label, and
    ``squared_probabilities`` the sum over all classes of their squares, which the Brier score needs.
    """

    prediction: np.ndarray
    probability: np.ndarray
    label_probability: np.ndarray
    squared_probabilities: np.ndarray


def scores(logits: np.ndarray, labels: np.ndarray) -> Scores:
    """Scores of logits float [n, n_classes] for labels integer [n]."""
    probabilities = softmax(np.asarray(logits, np.float64), axis=1)
    prediction, rows = logits.argmax(1).astype(np.int32), np.arange(len(labels))
    parts = (
        probabilities[rows, prediction], probabilities[rows, labels], np.square(probabilities).sum(1),
    )  # fmt: skip
    return Scores(prediction, *(part.astype(np.float32) for part in parts))


def quality(labels: np.ndarray, found: Scores) -> dict[str, float]:
    """Measures of predictions beside their accuracy, by name.

    ``balanced_accuracy``: mean over classes of the share of their rows that are right; ``macro_f1``: mean
    over classes of the harmonic mean of precision and recall (both over the classes that occur);
    ``log_loss``: mean of minus the natural logarithm of the label's probability, of which float32 holds no
    smaller than 1e-38; ``brier``: mean squared distance of the probabilities from the truth, in [0, 2];
    ``calibration_error``: expected calibration error with 15 bins of equal width, the mean distance of
    confidence and accuracy weighed by the bins' rows.
    """
    from sklearn.metrics import f1_score, recall_score  # takes a second, and every worker imports this file

    options = {"labels": np.unique(labels), "average": "macro", "zero_division": 0}
    of_label = found.label_probability.astype(np.float64)
    return {
        "balanced_accuracy": float(recall_score(labels, found.prediction, **options)),
        "macro_f1": float(f1_score(labels, found.prediction, **options)),
        "log_loss": float(-np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).mean()),
        "brier": float((1 - 2 * of_label + found.squared_probabilities).mean()),
        "calibration_error": _calibration_error(found.probability, found.prediction == labels),
    }


def _calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(right))


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
