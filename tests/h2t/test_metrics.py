import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2t import metrics, paper
from h2t.errors import UserError

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
