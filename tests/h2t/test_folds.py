"""Cross-validation index sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2t.errors import UserError
from h2t.folds import folds


def test_five_blocks_of_200_of_the_first_1000() -> None:
    for fold, (train, validation) in enumerate(folds(1000)):
        np.testing.assert_array_equal(validation, np.arange(200 * fold, 200 * fold + 200))
        assert len(train) == 800


def test_uneven_blocks_are_longest_first() -> None:
    assert [rows.tolist() for _, rows in folds(7, 5)] == [[0, 1], [2, 3], [4], [5], [6]]
    assert [rows.tolist() for _, rows in folds(7, 2)] == [[0, 1, 2, 3], [4, 5, 6]]


@given(st.integers(5, 400), st.integers(2, 5))
def test_every_row_validates_once_and_never_trains_its_own_fold(n_samples: int, n_folds: int) -> None:
    pairs = folds(n_samples, n_folds)
    everything = np.arange(n_samples)
    np.testing.assert_array_equal(np.concatenate([validation for _, validation in pairs]), everything)
    for train, validation in pairs:
        assert train.dtype == validation.dtype == np.int64
        assert len(validation) > 0
        assert (np.diff(train) > 0).all()
        np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), everything)


@pytest.mark.parametrize(
    ("n_samples", "n_folds", "message"),
    [(1000, 1, "at least 2 folds, got 1"), (3, 5, "cannot cut 3 training images into 5 folds")],
)
def test_impossible_folds(n_samples: int, n_folds: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        folds(n_samples, n_folds)
