"""Scores and kept features against the official code's, and what must hold for any scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import f_oneway, rankdata
from sklearn.feature_selection import mutual_info_classif

from h2t.errors import UserError
from h2t.features import FeatureLayout
from h2t.selection import BINS, DATA_RULES, WEIGHT_RULES, keep_top, relevance_scores

GOLDENS = Path(__file__).parents[1] / "goldens"
NOTES = json.loads((GOLDENS / "misc.json").read_text())
LAYERS, TRAJECTORIES = np.load(GOLDENS / "layers.npz"), np.load(GOLDENS / "traj.npz")
LAYOUT = FeatureLayout(("a", "none", "b", "c"), (7, 0, 4, 12))
WEIGHT = np.random.default_rng(4).normal(size=(LAYOUT.n_features, 3)).astype(np.float32)


@pytest.mark.parametrize("case", NOTES["n_kept"], ids=lambda case: f"{case['N']}-{case['F']}")
def test_keeps_as_many_as_the_official_code(case: dict) -> None:
    assert len(keep_top(np.zeros(case["N"], np.float32), case["F"])) == case["n_topk"]


@pytest.mark.parametrize("case", [c for c in NOTES["ties"] if not c["offset"] and not c["interp"]])
def test_ties_go_to_the_lower_index(case: dict) -> None:
    np.testing.assert_array_equal(keep_top(np.array(case["scores"]), case["F"]), np.sort(case["kept"]))


def test_scores_are_sums_of_squared_weights() -> None:
    weight = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, -2.0]], np.float32)
    np.testing.assert_array_equal(relevance_scores(weight), [25, 0, 5])
    np.testing.assert_array_equal(relevance_scores(torch.from_numpy(weight)), [25, 0, 5])


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50), st.floats(0.01, 1))
def test_kept_scores_are_at_least_those_left(scores: list[float], fraction: float) -> None:
    values = np.array(scores, np.float32)
    kept = keep_top(values, fraction)
    left = np.delete(values, kept)
    assert (np.diff(kept) > 0).all()
    assert kept.dtype == np.int64
    assert not len(kept) or not len(left) or values[kept].min() >= left.max()


@given(st.integers(1, 60), st.floats(0.01, 1), st.integers(0, 60))
def test_an_offset_leaves_the_highest_scores_out(n_features: int, fraction: float, offset: int) -> None:
    scores, n_kept = np.random.default_rng(n_features).random(n_features), int(n_features * fraction)
    if offset + n_kept > n_features:
        with pytest.raises(UserError, match=f"offset of 0 to {n_features - n_kept}"):
            keep_top(scores, fraction, offset)
    else:
        ranking = np.argsort(-scores)
        kept = keep_top(scores, fraction, offset)
        np.testing.assert_array_equal(kept, np.sort(ranking[offset : offset + n_kept]))


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_rules_by_weights_score_every_feature(rule: str) -> None:
    scores = WEIGHT_RULES[rule](WEIGHT, LAYOUT)
    assert scores.shape == (LAYOUT.n_features,)
    np.testing.assert_array_equal(scores, WEIGHT_RULES[rule](torch.from_numpy(WEIGHT), LAYOUT))


def inputs_with_a_signal() -> tuple[np.ndarray, np.ndarray]:
    """Feature 3 says the class and varies the most; feature 5 is constant; the others are noise."""
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    inputs = generator.normal(size=(90, 12)).astype(np.float32)
    inputs[:, 3] += 4 * labels
    inputs[:, 5] = 0.25
    return inputs, labels


@pytest.mark.parametrize("rule", DATA_RULES)
def test_rules_by_the_training_images_find_the_feature_that_says_the_class(rule: str) -> None:
    inputs, labels = inputs_with_a_signal()
    before = inputs.copy()
    scores = DATA_RULES[rule](inputs, labels, 0)
    assert scores.shape == (12,)
    assert np.isfinite(scores).all()
    if rule != "random":
        assert scores.argmax() == 3
        assert scores[5] == scores.min()
    np.testing.assert_array_equal(scores, DATA_RULES[rule](inputs, labels, 0))
    np.testing.assert_array_equal(inputs, before)


def test_mutual_information_is_that_of_scikit_learn_on_the_bins() -> None:
    inputs, labels = inputs_with_a_signal()
    order = np.argsort(labels, kind="stable")  # so that the order of equal values would tell the class
    inputs, labels = inputs[order], labels[order]
    ranks = rankdata(inputs, method="min", axis=0).astype(int) - 1
    expected = mutual_info_classif(ranks * BINS // len(inputs), labels, discrete_features=True)
    scores = DATA_RULES["mutual_information"](inputs, labels, 0)
    np.testing.assert_allclose(scores, expected, atol=1e-9)
    assert scores[5] == 0


def test_the_f_test_is_that_of_scipy() -> None:
    inputs, labels = inputs_with_a_signal()
    expected = f_oneway(*(inputs[labels == label, 0] for label in range(3))).statistic
    np.testing.assert_allclose(DATA_RULES["f_test"](inputs, labels, 0)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("rule", ["tap_mean", "tap_norm"])
@pytest.mark.parametrize("n_kept", range(1, LAYOUT.n_features + 1))
def test_rules_by_tap_keep_whole_taps_but_for_the_last(rule: str, n_kept: int) -> None:
    fraction = (n_kept + 0.5) / LAYOUT.n_features if n_kept < 23 else 1.0
    kept = keep_top(WEIGHT_RULES[rule](WEIGHT, LAYOUT), fraction)
    counts = LAYOUT.of_kept(kept).widths
    cut = [tap for tap, count in enumerate(counts) if 0 < count < LAYOUT.widths[tap]]
    assert len(cut) <= 1
    for tap in cut:  # to its first features
        start = LAYOUT.offsets[tap]
        np.testing.assert_array_equal(kept[LAYOUT.tap_of(kept) == tap], np.arange(start, start + counts[tap]))


def test_taps_are_ranked_by_their_mean_or_by_their_norm() -> None:
    """One large row has the larger mean; many small ones in a wide tap have the larger norm."""
    layout = FeatureLayout(("narrow", "wide"), (1, 9))
    weight = np.array([[2.0]] + [[1.0]] * 9, np.float32)
    assert keep_top(WEIGHT_RULES["tap_mean"](weight, layout), 0.1).tolist() == [0]
    assert keep_top(WEIGHT_RULES["tap_norm"](weight, layout), 0.1).tolist() == [1]


@pytest.mark.parametrize("fraction", ["0.01", "0.05", "0.2"])
def test_layer_wise_keeps_what_the_official_code_keeps(fraction: str) -> None:
    widths = TRAJECTORIES["layer_sizes"].tolist()
    layout = FeatureLayout(tuple(map(str, range(len(widths)))), tuple(widths))
    scores = WEIGHT_RULES["tap_mean"](TRAJECTORIES["gl_1e-3_lr0.01/W_200"], layout)
    kept = keep_top(scores, float(fraction))
    official = LAYERS[f"gl_1e-3_lr0.01/kept_connectivity_l2layer_F{fraction}"]
    np.testing.assert_array_equal(kept, np.sort(official))


def test_random_features_depend_on_the_seed_alone() -> None:
    rule, (inputs, labels) = DATA_RULES["random"], inputs_with_a_signal()
    scores = rule(inputs, labels, 7)
    np.testing.assert_array_equal(scores, rule(-3 * inputs, labels[::-1], 7))
    assert not np.array_equal(scores, rule(inputs, labels, 8))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_fractions_outside_the_range_are_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"keep_fraction in \(0, 1\]"):
        keep_top(np.ones(10), fraction)
