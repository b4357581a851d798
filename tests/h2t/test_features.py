import numpy as np
import pytest
import torch

from h2t.errors import UserError
from h2t.features import FeatureLayout, default_embedding, keep_features, unit_norm

LAYOUT = FeatureLayout(("a", "b", "c"), (3, 1, 4))


def features(n: int = 5) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(n, LAYOUT.n_features)).astype(np.float32)
    values[1, :3] = 0
    values.flags.writeable = False
    return values


def test_layout_says_where_each_tap_lies() -> None:
    assert LAYOUT.n_features == 8
    assert LAYOUT.offsets.tolist() == [0, 3, 4, 8]
    assert LAYOUT.slices == (slice(0, 3), slice(3, 4), slice(4, 8))
    assert LAYOUT.tap_of(np.arange(8)).tolist() == [0, 0, 0, 1, 2, 2, 2, 2]


def test_tap_of_passes_over_taps_without_features() -> None:
    layout = FeatureLayout(("a", "nothing", "b"), (2, 0, 1))
    assert layout.tap_of(np.arange(3)).tolist() == [0, 0, 2]


def test_the_layout_of_kept_features_has_all_taps() -> None:
    assert LAYOUT.of_kept(np.array([0, 2, 5])) == FeatureLayout(("a", "b", "c"), (2, 0, 1))
    assert LAYOUT.of_kept(np.arange(8)) == LAYOUT


@pytest.mark.parametrize(("taps", "embedding"), [(("a", "pre_logits", "b"), "pre_logits"), (("a", "b"), "b")])
def test_the_embedding_is_pre_logits_or_the_last_tap(taps: tuple[str, ...], embedding: str) -> None:
    assert default_embedding(taps) == embedding


def test_each_tap_of_each_example_has_unit_norm_and_zero_stays_zero() -> None:
    normed = unit_norm(features(), LAYOUT)
    norms = np.stack([np.linalg.norm(normed[:, columns], axis=1) for columns in LAYOUT.slices], axis=1)
    expected = np.ones((5, 3))
    expected[1, 0] = 0
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, lambda values: torch.from_numpy(np.array(values))])
def test_arrays_and_tensors_agree_and_out_is_filled(kind) -> None:
    raw = kind(features())
    out = kind(np.empty_like(features()))
    if isinstance(out, np.ndarray):
        out = np.empty_like(features())
    assert unit_norm(raw, LAYOUT, out=out) is out
    np.testing.assert_allclose(out, unit_norm(features(), LAYOUT), rtol=1e-6)
    kept = np.array([0, 2, 5])
    ours, expected = keep_features(raw, LAYOUT, kept), keep_features(features(), LAYOUT, kept)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_kept_features_have_unit_norm_over_what_is_kept_of_the_tap() -> None:
    raw = features()
    chosen = keep_features(raw, LAYOUT, np.array([0, 2, 5]))
    first = raw[:, [0, 2]] / np.maximum(np.linalg.norm(raw[:, [0, 2]], axis=1, keepdims=True), 1e-30)
    np.testing.assert_allclose(chosen[:, :2], first, rtol=1e-6)
    np.testing.assert_allclose(chosen[:, 2], np.sign(raw[:, 5]), rtol=1e-6)


def test_keeping_everything_is_the_unit_norm() -> None:
    np.testing.assert_array_equal(
        keep_features(features(), LAYOUT, np.arange(8)), unit_norm(features(), LAYOUT)
    )


@pytest.mark.parametrize("kept", [[0, 2, 5], [3, 4, 5, 6], [1], list(range(8)), []])
def test_rows_choose_and_order_the_examples(kept: list[int]) -> None:
    rows, columns = np.array([4, 0, 1]), np.array(kept, np.int64)
    expected = keep_features(features()[rows], LAYOUT, columns)
    np.testing.assert_allclose(keep_features(features(), LAYOUT, columns, rows), expected, rtol=1e-6)
    tensor = torch.from_numpy(np.array(features()))
    np.testing.assert_allclose(keep_features(tensor, LAYOUT, columns, rows), expected, rtol=1e-6)


def test_a_matrix_of_another_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"\(5, 7\): expected \[n, 8\]"):
        unit_norm(features()[:, :7], LAYOUT)
