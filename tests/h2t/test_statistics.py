"""Intervals and tests against simulations in which the truth is known."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from h2t.statistics import (
    accuracy_estimate,
    average_ranks,
    holm,
    mcnemar,
    mean_estimate,
    median_seed,
    paired_difference,
    wilcoxon,
)

EASE, OF_IMAGES = 1.0, 2.0  # in logits


def simulated(generator: np.random.Generator, n_seeds: int, n_images: int, of_seeds: float) -> np.ndarray:
    """Correctness of trainings of unequal luck on images of unequal difficulty."""
    image = generator.normal(0, OF_IMAGES, (1, n_images))
    seed = generator.normal(0, of_seeds, (n_seeds, 1))
    return generator.random((n_seeds, n_images)) < expit(EASE + image + seed)


def true_accuracy(of_seeds: float) -> float:
    values = np.linspace(-8, 8, 4001)
    return float(
        np.average(expit(EASE + values * np.hypot(OF_IMAGES, of_seeds)), weights=stats.norm.pdf(values))
    )


@pytest.mark.parametrize(("n_seeds", "of_seeds"), [(3, 0.0), (3, 0.05), (3, 0.15), (5, 0.15), (1, 0.0)])
def test_the_interval_covers_the_truth_in_95_of_100_cases(n_seeds: int, of_seeds: float) -> None:
    generator, truth = np.random.default_rng(0), true_accuracy(of_seeds)
    found = [accuracy_estimate(simulated(generator, n_seeds, 500, of_seeds)) for _ in range(1000)]
    coverage = np.mean([estimate.low <= truth <= estimate.high for estimate in found])
    assert 0.93 <= coverage <= 0.98


def test_a_difference_of_nothing_is_found_in_5_of_100_cases_and_one_of_five_points_nearly_always() -> None:
    generator = np.random.default_rng(0)
    equal, unequal = [], []
    for _ in range(400):
        right = simulated(generator, 3, 1000, 0.0)
        other = simulated(generator, 3, 1000, 0.0)
        equal.append(paired_difference(right, other).p_value < 0.05)
        worse = other & (generator.random(other.shape) > 0.08)
        unequal.append(paired_difference(right, worse).low > 0)
    assert 0.02 <= np.mean(equal) <= 0.08
    assert np.mean(unequal) > 0.8


def test_one_seed_and_one_image_each() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, (1, 40))
    estimate, expected = mean_estimate(values), stats.ttest_1samp(values[0], 0)
    assert estimate.p_value == pytest.approx(expected.pvalue)
    assert estimate[1:3] == pytest.approx(tuple(expected.confidence_interval(0.95)))
    right = np.array([[True] * 30 + [False] * 10])
    wilson = stats.binomtest(30, 40).proportion_ci(method="wilson")
    assert accuracy_estimate(right)[:3] == pytest.approx((0.75, wilson.low, wilson.high))


def test_all_alike() -> None:
    right = np.ones((3, 20), bool)
    assert accuracy_estimate(right) == (1, 1, 1, 0)
    assert paired_difference(right, right) == (0, 0, 0, 1)


def test_mcnemar_is_the_binomial_test_of_what_differs() -> None:
    first, second = (
        np.array([1] * 50 + [0] * 50, bool),
        np.array([1] * 47 + [0] * 3 + [1] * 12 + [0] * 38, bool),
    )
    assert mcnemar(first, second) == pytest.approx(stats.binomtest(3, 15).pvalue)
    assert mcnemar(first, first) == 1


def test_the_training_of_median_accuracy() -> None:
    values = np.array([[1, 1, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]], bool)
    assert median_seed(values[:3]).tolist() == values[2].tolist()
    assert median_seed(values).tolist() == values[2].tolist()


def test_over_tasks() -> None:
    gains = [0.1, 0.2, 0.05, 0.3, 0.15, 0.4]
    assert wilcoxon(gains) == pytest.approx(2 / 2**6)
    assert np.isnan(wilcoxon([0.1]))
    assert wilcoxon([0.0, 0.0]) == 1
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "none": float("nan")})
    assert [corrected[name] for name in "abc"] == pytest.approx([0.03, 0.06, 0.06])
    assert np.isnan(corrected["none"])
    assert average_ranks(np.array([[3, 1, 2], [5, 5, 1]])).tolist() == [1.25, 2.25, 2.5]
