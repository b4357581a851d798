"""How sure an accuracy is, and whether one differs from another by more than chance.

Correctness, here, is bool or a number [n_seeds, n_images]: whether the training with a seed got a test image
right. What is estimated is the accuracy that another training of the same kind would have on other images of
the same kind, so that both count as drawn at random: images, shared by all seeds, and seeds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean with its interval of confidence ``LEVEL``, and the p-value of its being zero (two-sided)."""

    mean: float
    low: float
    high: float
    p_value: float


def accuracy_estimate(correctness: np.ndarray) -> Estimate:
    """The accuracy of correctness [n_seeds, n_images].

    Of several seeds the interval covers images and seeds (:func:`mean_estimate`); of a single one images
    alone, by Wilson's score interval.
    """
    from statsmodels.stats.proportion import proportion_confint

    if len(correctness) > 1:
        found = mean_estimate(correctness)
        return found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0))
    n_right, n_images = int(np.count_nonzero(correctness)), correctness.shape[1]
    low, high = proportion_confint(n_right, n_images, 1 - LEVEL, method="wilson")
    return Estimate(n_right / n_images, float(low), float(high), float("nan"))


def mean_estimate(values: np.ndarray) -> Estimate:
    """The mean of values [n_seeds, n_images], such as differences of correctness.

    Images and seeds are the two crossed random effects of an analysis of variance. The variance of the mean
    is that of images (of the means over seeds) plus that of seeds (of the means over images), each divided by
    its number, minus what both hold of the rest; Satterthwaite's degrees of freedom take account of how few
    seeds there are. A bootstrap over three seeds would know only two thirds of their variance.
    """
    values = np.asarray(values, np.float64)
    n_seeds, n_images = values.shape
    by_image, by_seed, mean = values.mean(0), values.mean(1), float(values.mean())
    of_images = by_image.var(ddof=1) / n_images
    variance, freedom = of_images, n_images - 1.0
    if n_seeds > 1:
        of_seeds = by_seed.var(ddof=1) / n_seeds
        rest = values - by_image - by_seed[:, None] + mean
        degrees = np.array([n_images - 1, n_seeds - 1, (n_images - 1) * (n_seeds - 1)])
        of_rest = np.square(rest).sum() / degrees[2] / values.size
        if of_seeds > of_rest:
            variance = of_images + of_seeds - of_rest
            freedom = variance**2 / (np.array([of_images, of_seeds, of_rest]) ** 2 / degrees).sum()
    if not variance > 0:
        return Estimate(mean, mean, mean, float(mean == 0))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * variance**0.5
    p_value = 2 * float(stats.t.sf(abs(mean) / variance**0.5, freedom))
    return Estimate(mean, mean - half, mean + half, p_value)


def paired_difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Accuracy of the first minus that of the second on the same images; seeds are paired in their order.

    The seed with more in one than in the other is left out.
    """
    n_seeds = min(len(first), len(second))
    return mean_estimate(first[:n_seeds].astype(float) - second[:n_seeds])


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact McNemar test of two models' correctness, bool [n_images]: p-value of their being equally good."""
    from statsmodels.stats.contingency_tables import mcnemar as test

    first, second = np.asarray(first, bool), np.asarray(second, bool)
    table = [[np.sum(a & b) for b in (second, ~second)] for a in (first, ~first)]
    return float(test(table, exact=True).pvalue)


def median_seed(correctness: np.ndarray) -> np.ndarray:
    """Correctness, [n_images], of the training of median accuracy (the lower one of an even number)."""
    order = np.argsort(correctness.mean(1), kind="stable")
    return correctness[order[(len(order) - 1) // 2]]


def wilcoxon(differences: Sequence[float]) -> float:
    """Wilcoxon signed-rank test of a difference per task: p-value of a median of 0; NaN below 2 tasks."""
    values = np.asarray(differences, float)
    if len(values) < 2 or not values.any():
        return float("nan") if len(values) < 2 else 1.0
    return float(stats.wilcoxon(values).pvalue)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values of several comparisons, corrected by Holm's step-down method; NaN stays and does not count."""
    from statsmodels.stats.multitest import multipletests

    known = {name: value for name, value in p_values.items() if not np.isnan(value)}
    corrected = multipletests(list(known.values()), method="holm")[1] if known else []
    return dict(p_values) | dict(zip(known, map(float, corrected), strict=True))


def average_ranks(scores: np.ndarray) -> np.ndarray:
    """Mean rank of each method, [n_methods], from scores [n_tasks, n_methods]; rank 1 is the highest."""
    return stats.rankdata(-np.asarray(scores), axis=1).mean(0)
