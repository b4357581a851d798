"""Cross-validation index sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2t.errors import UserError
from h2t.folds import SCHEMES, folds


@pytest.mark.parametrize("scheme", SCHEMES)
def test_five_blocks_of_200_of_the_first_1000(scheme):
    for fold, (train, validation) in enumerate(folds(1000, 5, scheme)):
        np.testing.assert_array_equal(validation, np.arange(200 * fold, 200 * fold + 200))
        assert len(train) == 800


def test_uneven_blocks_are_longest_first():
    assert [rows.tolist() for _, rows in folds(7, 5)] == [[0, 1], [2, 3], [4], [5], [6]]
    assert [rows.tolist() for _, rows in folds(7, 2)] == [[0, 1, 2, 3], [4, 5, 6]]


@given(st.integers(5, 400), st.integers(2, 5), st.sampled_from(SCHEMES))
def test_every_row_validates_once_and_never_trains_its_own_fold(n_samples, n_folds, scheme):
    pairs = folds(n_samples, n_folds if scheme == "blocks" else 5, scheme)
    np.testing.assert_array_equal(
        np.concatenate([validation for _, validation in pairs]), np.arange(n_samples)
    )
    for train, validation in pairs:
        assert train.dtype == validation.dtype == np.int64
        assert len(validation) > 0
        np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(n_samples))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 1, "blocks"), "at least 2 folds, got 1"),
        ((3, 5, "blocks"), "cannot cut 3 training images into 5 folds"),
        ((1000, 4, "archive"), "exactly 5 folds, got 4"),
        ((1000, 5, "block"), "did you mean blocks"),
    ],
)
def test_impossible_folds(arguments, message):
    with pytest.raises(UserError, match=message):
        folds(*arguments)
