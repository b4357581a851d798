"""Scores and kept features against the official code's, and what must hold for any scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from h2t.errors import UserError
from h2t.selection import keep_top, relevance_scores

NOTES = json.loads((Path(__file__).parents[1] / "goldens" / "misc.json").read_text())


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


def test_a_fraction_of_one_keeps_everything() -> None:
    np.testing.assert_array_equal(keep_top(np.random.default_rng(0).random(17), 1.0), np.arange(17))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_fractions_outside_the_range_are_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"keep_fraction in \(0, 1\]"):
        keep_top(np.ones(10), fraction)
