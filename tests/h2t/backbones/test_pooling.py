import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h2t.backbones import pooling
from h2t.backbones.aggregation import Aggregation
from h2t.backbones.pooling import falls_back, pool, pool_to_all, pooled_size, window

GOLDENS = Path(__file__).parents[2] / "goldens"
CASES = [
    case for case in json.loads((GOLDENS / "pooling.json").read_text())["cases"] if "target_size" in case
]
VALUES = np.load(GOLDENS / "pooling.npz")


def golden_input(case: dict) -> torch.Tensor:
    """The input of a case by its formula; maps are [b, h, w, c] in the file and [b, c, h, w] here."""
    i = np.arange(np.prod(case["shape"]), dtype=np.int64)
    values = ((i * 7919 + case["seed"] * 104729) % 1009) / 1009 - 0.5
    tensor = torch.from_numpy(values.astype(np.float32).reshape(case["shape"]))
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['shape']}-{c['target_size']}-{c.get('cls_token_pool')}"
)
def test_matches_the_official_implementation(case: dict) -> None:
    activation = golden_input(case)
    cls_token = case.get("cls_token_pool", "normal")
    pooled = pool(activation, case["target_size"], Aggregation(cls_token))
    assert list(pooled.shape) == case["out_shape"]
    assert pooled_size(activation.shape[1:], case["target_size"], Aggregation(cls_token)) == pooled.shape[1]
    flat = pooled.double().numpy().ravel()
    weights = (np.arange(flat.size) % 97 + 1) / 97
    checksums = [case["sum"], case["sumsq"], case["dot"]]
    np.testing.assert_allclose([flat.sum(), flat @ flat, flat @ weights], checksums, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(pooled[0, :8], case["first8"], atol=1e-6)
    np.testing.assert_allclose(pooled[0, -8:], case["last8"], atol=1e-6)
    if "values_key" in case:
        np.testing.assert_allclose(pooled, VALUES[case["values_key"]], atol=1e-6)


def test_every_kind_of_golden_is_there() -> None:
    assert {len(case["shape"]) for case in CASES} == {2, 3, 4}
    assert len(CASES) > 80


@pytest.mark.parametrize("channels_last", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    side=st.integers(1, 17),
    channels=st.integers(1, 9),
    targets=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
)
def test_windows_of_a_map_are_means_in_height_width_channel_order(
    channels_last: bool, side: int, channels: int, targets: list[int]
) -> None:
    activation = torch.arange(2.0 * channels * side * side).reshape(2, channels, side, side).sin()
    if channels_last:
        activation = activation.contiguous(memory_format=torch.channels_last)
    together = pool_to_all(activation, targets)
    for target in targets:
        size = window((channels, side, side), target)
        windows = side // size if size else 1
        size = size or side
        expected = torch.stack(
            [
                activation[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size].mean((2, 3))
                for i in range(windows)
                for j in range(windows)
            ],
            dim=1,
        ).flatten(1)
        torch.testing.assert_close(together[target], expected)
        assert together[target].shape[1] == pooled_size((channels, side, side), target)


@given(tokens=st.integers(2, 40), channels=st.integers(1, 9), target=st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_class_token_is_kept_beside_the_pooled_rest(tokens: int, channels: int, target: int) -> None:
    activation = torch.arange(2.0 * tokens * channels).reshape(2, tokens, channels).cos()
    beside = pool(activation, target, Aggregation("nopool_cls"))
    torch.testing.assert_close(beside[:, :channels], activation[:, 0])
    torch.testing.assert_close(beside[:, channels:], pool(activation[:, 1:], target))
    assert beside.shape[1] == pooled_size((tokens, channels), target, Aggregation("nopool_cls"))
    torch.testing.assert_close(pool(activation, target, Aggregation("only_cls")), activation[:, 0])


def test_fallback_to_the_mean_is_told_apart_from_enough_channels() -> None:
    assert falls_back((64, 15, 15), 24576)
    assert falls_back((50, 64), 15360)
    assert not falls_back((64, 15, 15), 8192)
    assert not falls_back((64, 15, 15), 64)
    assert not falls_back((64,), 24576)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 5, 3), (2, 7)])
@pytest.mark.parametrize("target_size", [1, 48])
def test_the_result_is_float32_and_shares_no_memory_with_the_activation(
    shape: tuple, target_size: int
) -> None:
    activation = torch.ones(shape)
    pooled = pool(activation, target_size)
    activation.zero_()
    assert pooled.eq(1).all()
    assert pool(activation.bfloat16(), target_size).dtype == torch.float32


def test_low_precision_activations_are_summed_in_float32() -> None:
    activation = torch.rand(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for target_size in (4, 64):
        exact = pool(activation.double(), target_size)
        torch.testing.assert_close(pool(activation, target_size), exact, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_activation() -> None:
    activation = torch.ones(1, 2, 4, 4, requires_grad=True)
    pool(activation, 8).sum().backward()
    torch.testing.assert_close(activation.grad, torch.full((1, 2, 4, 4), 0.25))


@pytest.mark.parametrize("shape", [(2, 7, 9, 5), (1, 1, 10, 3), (2, 8, 8, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processors_and_gpus_pool_alike(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    positions = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for side in (2, 3, 4):
        high = 1 if shape[1] == 1 else side
        by_pooling, by_reduction = (
            means(positions, high, side) for means in (pooling._means_by_pooling, pooling._means_by_reduction)
        )
        assert by_pooling.dtype == by_reduction.dtype == torch.float32
        torch.testing.assert_close(by_pooling, by_reduction)
