import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss

from h2t import metrics, paper
from h2t.errors import UserError
from h2t.metrics import Scores, quality, scores

LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=120)


@given(LABELS)
def test_accuracy_is_correct_over_n_and_official_is_never_above(pairs) -> None:
    labels, predictions = zip(*pairs, strict=True)
    expected = sum(label == guess for label, guess in pairs)
    assert metrics.correct(labels, predictions) == expected
    assert metrics.accuracy(labels, predictions) == expected / len(pairs)
    official = metrics.official_accuracy(expected, len(pairs))
    assert official <= expected / len(pairs)
    assert (official == expected / len(pairs)) == (expected == 0 or len(pairs) % 50 == 0)


def test_official_accuracy_equals_the_mean_over_batches_counted_as_full() -> None:
    random = np.random.default_rng(0)
    hits = random.random(711) < 0.7
    batches = [hits[start : start + 50].sum() / 50 for start in range(0, 711, 50)]
    assert metrics.official_accuracy(int(hits.sum()), 711) == pytest.approx(np.mean(batches), abs=1e-12)
    assert metrics.official_accuracy(711, 711) == 0.948


@pytest.mark.parametrize("pair", [([], []), ([1, 2], [1]), ([[1]], [[1]])])
def test_accuracy_refuses_what_it_cannot_count(pair) -> None:
    with pytest.raises(UserError, match="one length of at least 1"):
        metrics.accuracy(*pair)
    with pytest.raises(UserError, match="at least 1 row"):
        metrics.official_accuracy(0, 0)


def test_cross_entropy_agrees_with_the_definition_and_survives_large_logits() -> None:
    logits = np.array([[0.0, 1.0, -1.0], [2.0, 0.5, 0.0]])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -(math.log(probabilities[0, 2]) + math.log(probabilities[1, 0])) / 2
    assert metrics.cross_entropy(logits, [2, 0]) == pytest.approx(expected)
    assert metrics.cross_entropy(np.float32([[1e4, 0.0]]), [1]) == pytest.approx(1e4)


def test_median_and_std_over_seeds() -> None:
    summary = metrics.median_and_std([0.1, 0.4, 0.2])
    assert summary == (0.2, pytest.approx(0.152753, abs=1e-6), 3)
    single = metrics.median_and_std([0.7])
    assert (single.median, single.n) == (0.7, 1)
    assert math.isnan(single.std)
    assert metrics.median_and_std([0.7, math.nan, 0.9]).median == pytest.approx(0.8)
    assert math.isnan(metrics.median_and_std([]).median)


def test_the_papers_deviations_on_kitti_are_sample_deviations() -> None:
    """Three accuracies of k/750 can deviate by the printed 0.20 with a divisor of 2, but not of 3."""
    gaps = np.arange(30)
    triples = np.stack(np.broadcast_arrays(0, gaps[:, None], gaps[None, :])) / 7.5
    printed = {
        round(paper.deviations("resnet50", method)["KITTI-Dist"], 2) for method in ("all_l1", "all_l21")
    }
    assert printed == {0.2, 0.41}
    assert printed <= set(np.unique(np.round(triples.std(0, ddof=1), 2)))
    assert 0.2 not in set(np.unique(np.round(triples.std(0, ddof=0), 2)))


def test_group_means_weigh_tasks_alike() -> None:
    means = metrics.group_means(
        {"a": 1.0, "b": 2.0, "c": 6.0}, {"a": "natural", "b": "natural", "c": "structured"}
    )
    assert means == {"natural": 1.5, "structured": 6.0, "all": 3.0}
    assert metrics.group_means({}, {}) == {}


def test_domain_affinity_orders_from_far_to_near_and_leaves_out_what_is_missing() -> None:
    affinity = metrics.domain_affinity({"a": 0.9, "b": 0.3, "c": 0.5}, {"a": 0.1, "b": 0.6})
    assert list(affinity.items()) == [("b", pytest.approx(-0.3)), ("a", pytest.approx(0.8))]


def test_spearman_where_there_is_nothing_to_rank() -> None:
    assert metrics.spearman([1, 2, 3], [10, 20, 40]) == pytest.approx(1.0)
    assert math.isnan(metrics.spearman([1, 2], [1, 2]))
    assert math.isnan(metrics.spearman([1, 1, 1], [1, 2, 3]))
    with pytest.raises(UserError, match="one length"):
        metrics.spearman([1, 2, 3], [1, 2])


def test_measures_of_predictions_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(0, 5, 400), 2 * generator.normal(size=(400, 5))
    logits[np.arange(400), labels] += 1
    found, probabilities = scores(logits, labels), softmax(logits, axis=1)
    measures = quality(labels, found)
    assert measures["log_loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    assert measures["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    assert measures["macro_f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    truth = np.eye(5)[labels]
    assert measures["brier"] == pytest.approx(np.square(probabilities - truth).sum(1).mean(), rel=1e-5)
    assert [getattr(found, name).dtype.name for name in found._fields] == ["int32"] + ["float32"] * 3


@pytest.mark.parametrize(("confidence", "error"), [(0.8, 0.0), (1.0, 0.2), (0.5, 0.3)])
def test_calibration_error_is_the_distance_of_confidence_and_accuracy(confidence, error) -> None:
    labels, prediction = np.zeros(1000, int), (np.arange(1000) % 5 == 0).astype(np.int32)  # 80 % right
    constant = np.full(1000, confidence, np.float32)
    measures = quality(labels, Scores(prediction, constant, constant, constant))
    assert measures["calibration_error"] == pytest.approx(error, abs=1e-6)


def test_a_probability_of_zero_has_a_finite_log_loss() -> None:
    found = scores(np.array([[1000.0, 0.0]]), np.array([1]))
    assert quality(np.array([1]), found)["log_loss"] == pytest.approx(87.3, abs=0.1)
