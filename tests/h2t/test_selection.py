"""Scores and kept features against the official code's, and what must hold for any scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from h2t.errors import UserError
from h2t.features import FeatureLayout
from h2t.selection import RULES, keep_top, relevance_scores

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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.97, 1.0])
def test_every_rule_keeps_the_same_number_in_ascending_order(rule: str, fraction: float) -> None:
    kept = RULES[rule](WEIGHT, LAYOUT, fraction, 0)
    assert kept.dtype == np.int64
    assert len(kept) == int(LAYOUT.n_features * fraction)
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(kept, RULES[rule](torch.from_numpy(WEIGHT), LAYOUT, fraction, 0))


@pytest.mark.parametrize("rule", ["tap_mean", "tap_norm"])
@pytest.mark.parametrize("n_kept", range(1, LAYOUT.n_features + 1))
def test_rules_by_tap_keep_whole_taps_but_for_the_last(rule: str, n_kept: int) -> None:
    kept = RULES[rule](WEIGHT, LAYOUT, (n_kept + 0.5) / LAYOUT.n_features if n_kept < 23 else 1.0, 0)
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
    assert RULES["tap_mean"](weight, layout, 0.1, 0).tolist() == [0]
    assert RULES["tap_norm"](weight, layout, 0.1, 0).tolist() == [1]


@pytest.mark.parametrize("fraction", ["0.01", "0.05", "0.2"])
def test_layer_wise_keeps_what_the_official_code_keeps(fraction: str) -> None:
    widths = TRAJECTORIES["layer_sizes"].tolist()
    layout = FeatureLayout(tuple(map(str, range(len(widths)))), tuple(widths))
    kept = RULES["tap_mean"](TRAJECTORIES["gl_1e-3_lr0.01/W_200"], layout, float(fraction), 0)
    official = LAYERS[f"gl_1e-3_lr0.01/kept_connectivity_l2layer_F{fraction}"]
    np.testing.assert_array_equal(kept, np.sort(official))


def test_random_features_depend_on_the_seed_alone() -> None:
    rule = RULES["random"]
    kept = rule(WEIGHT, LAYOUT, 0.5, 7)
    np.testing.assert_array_equal(kept, rule(None, LAYOUT, 0.5, 7))
    np.testing.assert_array_equal(kept, rule(-3 * WEIGHT, LAYOUT, 0.5, 7))
    assert not np.array_equal(kept, rule(WEIGHT, LAYOUT, 0.5, 8))
    assert set(rule(None, LAYOUT, 0.2, 7)) < set(kept)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_fractions_outside_the_range_are_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"keep_fraction in \(0, 1\]"):
        keep_top(np.ones(10), fraction)
