"""What else than the paper's averages is made of activations: grids, maxima, deviations, pyramids."""

import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from h2t.adapter import Adapter, save_head
from h2t.backbones import pooling
from h2t.backbones.aggregation import POOLINGS, Aggregation, Pooling, Tokens
from h2t.backbones.loading import load_backbone
from h2t.backbones.pooling import falls_back, laid_out, levels, places, pool, pool_to_all, pooled_size
from h2t.backbones.tap_reader import TapReader, feature_layout
from h2t.errors import UserError
from h2t.explanation import explain
from h2t.extraction import extract_features
from h2t.features import FeatureLayout
from h2t.head2toe import Head, fit, logits
from h2t.hyperparameters import Hyperparameters
from tests.h2t.backbones.conftest import some_images

GRID = Aggregation(tokens="grid")
IMAGES = list(np.random.default_rng(0).integers(0, 256, (10, 40, 44, 3), np.uint8))


def sines(*shape: int) -> Tensor:
    """Values that differ, also in their order of size."""
    return torch.arange(float(np.prod(shape))).reshape(shape).mul(1.7).sin()


def as_tokens(maps: Tensor, n_prefix: int) -> Tensor:
    """Tokens [b, n_prefix + h * w, c] of a map [b, c, h, w], row by row, behind some that are no patches."""
    prefix = 10 + sines(len(maps), n_prefix, maps.shape[1])
    return torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)


@settings(max_examples=40, deadline=None)
@given(
    side=st.integers(1, 9),
    channels=st.integers(1, 5),
    n_prefix=st.integers(0, 5),
    target=st.integers(1, 600),
    pooled=st.sampled_from(POOLINGS),
)
def test_tokens_on_a_grid_are_pooled_as_the_map_that_they_are(
    side: int, channels: int, n_prefix: int, target: int, pooled: Pooling
) -> None:
    maps = sines(2, channels, side, side)
    tokens, aggregation = as_tokens(maps, n_prefix), Aggregation(tokens="grid", pooling=pooled)
    features = pool(tokens, target, aggregation, n_prefix)
    beside = n_prefix * channels
    torch.testing.assert_close(features[:, :beside], tokens[:, :n_prefix].flatten(1), rtol=0, atol=0)
    torch.testing.assert_close(features[:, beside:], pool(maps, target, Aggregation(pooling=pooled)))
    assert features.shape[1] == pooled_size(tokens.shape[1:], target, aggregation, n_prefix)
    kept = Aggregation("nopool_cls", "grid", pooled)
    torch.testing.assert_close(pool(tokens, target, kept, n_prefix), features, rtol=0, atol=0)


def test_an_image_that_moves_by_one_patch_moves_the_windows_of_a_grid_alone() -> None:
    backbone = load_backbone("test_vit", weights="random", image_size=160)
    backbone.model.get_parameter("pos_embed").zero_()  # so that the first layer does not know where it is
    images = some_images(backbone, 2)
    down, right = images.roll(16, dims=2), images.roll(16, dims=3)
    target = 100 * 64  # a window for each of 10 x 10 patches
    with TapReader(backbone.only(("blocks_0_norm1",)), [target], GRID) as reader:
        still, lower, further = (
            reader(batch)[target][0].unflatten(1, (101, 64)) for batch in (images, down, right)
        )
    grids = [windows[:, 1:].unflatten(1, (10, 10)) for windows in (still, lower, further)]
    torch.testing.assert_close(grids[1], grids[0].roll(1, dims=1))
    torch.testing.assert_close(grids[2], grids[0].roll(1, dims=2))
    torch.testing.assert_close(lower[:, 0], still[:, 0])
    assert not torch.allclose(grids[1], grids[0])


def test_tokens_that_make_no_square_stay_a_sequence() -> None:
    assert laid_out((17, 3), GRID, 1) == (1, (3, 4, 4))
    assert laid_out((16, 3), GRID, 1) == (0, (3, 4, 4))  # a layer that the class token does not reach
    assert laid_out((21, 3), GRID, 5) == (5, (3, 4, 4))
    assert laid_out((14, 3), GRID, 1) == (0, (14, 3))
    assert laid_out((14, 3), Aggregation("nopool_cls", "grid"), 1) == (1, (13, 3))
    assert laid_out((5, 3), GRID, 5) == (0, (5, 3))
    tokens = sines(2, 14, 3)
    torch.testing.assert_close(pool(tokens, 12, GRID), pool(tokens, 12), rtol=0, atol=0)
    torch.testing.assert_close(pool(tokens, 12, Aggregation("only_cls", "grid")), tokens[:, 0])


def windows_of(activation: Tensor, target: int, aggregation: Aggregation) -> Iterator[np.ndarray]:
    """The positions [n, c] of the windows of one image's activation, in order, by loops."""
    positions = activation.numpy()
    positions = positions.transpose(1, 2, 0) if positions.ndim == 3 else positions[None]
    height, width, channels = positions.shape
    side = pooling.window(tuple(activation.shape), target)
    high, wide = (min(side, height), side) if side else (height, width)
    for top in range(0, height - high + 1, high):
        for left in range(0, width - wide + 1, wide):
            yield positions[top : top + high, left : left + wide].reshape(-1, channels)


@pytest.mark.parametrize("name", ["average_max", "average_std"])
@settings(max_examples=40, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 5), st.integers(1, 11)).map(lambda some: (some[0], some[1], some[1])),
        st.tuples(st.integers(2, 30), st.integers(1, 5)),
    ),
    targets=st.lists(st.integers(1, 400), min_size=1, max_size=3),
)
def test_maxima_and_deviations_stand_behind_the_averages(
    name: Pooling, shape: tuple[int, ...], targets: list[int]
) -> None:
    aggregation, second = Aggregation(pooling=name), np.max if name == "average_max" else np.std
    activation = sines(2, *shape)
    together = pool_to_all(activation, targets, aggregation)
    for target in targets:
        averages = pool(activation, target)
        for image in range(2):
            windows = list(windows_of(activation[image], target, aggregation))
            expected = np.concatenate([second(window, axis=0) for window in windows])
            expected = expected if len(windows[0]) > 1 else expected[:0]
            found = together[target][image].numpy()
            np.testing.assert_allclose(found[: averages.shape[1]], averages[image], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found[averages.shape[1] :], expected, rtol=1e-4, atol=1e-5)
        assert together[target].shape[1] == pooled_size(shape, target, aggregation)


def by_hand(positions: np.ndarray, n: int) -> np.ndarray:
    """Adaptive average pooling of positions [h, w, c] to n windows a side (one row has one), flattened."""
    height, width = positions.shape[:2]
    rows = min(n, height)
    return np.concatenate(
        [
            positions[
                i * height // rows : int(np.ceil((i + 1) * height / rows)),
                j * width // n : int(np.ceil((j + 1) * width / n)),
            ].mean((0, 1))
            for i in range(rows)
            for j in range(n)
        ]
    )


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        ((3, 8, 8), 48, (1, 2, 4)),
        ((3, 7, 7), 48, (1, 2, 4)),  # windows of 1 or 2 a side that overlap
        ((3, 7, 7), 47, (1, 2)),
        ((3, 8, 8), 3000, (1, 2, 4, 8)),
        ((3, 3, 3), 3000, (1, 2)),
        ((3, 8, 8), 2, (1,)),
        ((10, 3), 12, (1, 2, 4)),  # tokens
        ((10, 3), 3000, (1, 2, 4, 8)),
    ],
)
def test_a_pyramid_is_adaptive_average_pooling_to_1_2_4_windows(
    shape: tuple[int, ...], target: int, expected: tuple[int, ...]
) -> None:
    assert levels(shape, target) == expected
    activation = sines(2, *shape)
    aggregation = Aggregation(pooling="pyramid")
    found = pool_to_all(activation, [target, 1], aggregation)
    for image, features in zip(activation.numpy(), found[target].numpy(), strict=True):
        positions = image.transpose(1, 2, 0) if len(shape) == 3 else image[None]
        wanted = np.concatenate([by_hand(positions, n) for n in expected])
        np.testing.assert_allclose(features, wanted, rtol=1e-5, atol=1e-6)
    assert found[target].shape[1] == pooled_size(shape, target, aggregation)
    torch.testing.assert_close(found[1], pool(activation, 1))
    assert not falls_back(shape, target, aggregation)


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("tokens", ["sequence", "grid"])
@pytest.mark.parametrize("shape", [(2, 9, 9), (2, 8, 8), (26, 2), (31, 2)])
@pytest.mark.parametrize("target", [2, 8, 33, 500])
def test_places_are_the_positions_that_features_are_averages_of(
    name: Pooling, tokens: Tokens, shape: tuple[int, ...], target: int
) -> None:
    aggregation, activation = Aggregation("nopool_cls", tokens, name), sines(1, *shape)
    beside, laid = laid_out(shape, aggregation)
    positions = activation[0].movedim(0, -1) if len(shape) == 3 else activation[0, beside:]
    positions = (
        positions if positions.ndim == 3 else positions.unflatten(0, (laid[1] if len(laid) == 3 else 1, -1))
    )
    features = pool(activation, target, aggregation)[0].unflatten(0, (-1, 2))
    found = places(shape, target, aggregation)
    assert len(found) == len(features)
    for place, feature in zip(found, features, strict=True):
        if place:
            torch.testing.assert_close(feature, positions[place].mean((0, 1)))
    assert any(found) == (target > 2 and not falls_back(shape, target, aggregation))


@pytest.mark.parametrize("shape", [(2, 7, 9, 5), (1, 1, 10, 3), (2, 8, 8, 4)])
def test_processors_and_gpus_take_deviations_alike(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    activation = torch.randn(shape, generator=torch.Generator().manual_seed(0)).movedim(-1, 1)
    activation = activation if shape[1] > 1 else activation[:, :, 0].mT
    targets, aggregation = (8, 40), Aggregation(pooling="average_std")
    before = pool_to_all(activation, targets, aggregation)
    monkeypatch.setattr(pooling, "_means_by_pooling", pooling._means_by_reduction)
    for target, features in pool_to_all(activation, targets, aggregation).items():
        torch.testing.assert_close(features, before[target])


@pytest.mark.parametrize("name", POOLINGS)
def test_gradients_reach_the_activation_and_are_finite_where_nothing_varies(name: Pooling) -> None:
    activation = torch.cat([torch.ones(1, 2, 4, 4), sines(1, 2, 4, 4)]).requires_grad_()
    pool(activation, 8, Aggregation(pooling=name)).square().sum().backward()
    assert activation.grad is not None
    assert activation.grad.isfinite().all()
    assert activation.grad[1].any()
    exact = torch.autograd.functional.jacobian(
        lambda given: pool(given, 8, Aggregation(pooling=name)), activation[1:].detach()
    )
    step = 1e-2 * sines(1, 2, 4, 4).flip(3)
    ahead, behind = (pool(activation[1:].detach() + d, 8, Aggregation(pooling=name)) for d in (step, -step))
    torch.testing.assert_close((exact * step).sum((2, 3, 4, 5)), (ahead - behind) / 2, rtol=2e-2, atol=2e-4)


def test_low_precision_activations_give_float32() -> None:
    activation = torch.rand(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in POOLINGS:
        found = pool(activation, 16, Aggregation(pooling=name))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, pool(activation.float(), 16, Aggregation(pooling=name)))


@pytest.mark.filterwarnings("ignore:.*too small for a pooling window")
@pytest.mark.parametrize("name", POOLINGS)
def test_an_adapter_reads_and_explains_what_its_head_was_trained_on(name: Pooling) -> None:
    backbone, target = load_backbone("test_vit", weights="random", image_size=160), 1024
    aggregation = Aggregation(tokens="grid", pooling=name)
    features = extract_features(backbone, IMAGES, target, aggregation=aggregation)
    layout = feature_layout(backbone, target, aggregation)
    assert features.shape == (10, layout.n_features)
    point = Hyperparameters("head2toe", target, 0.1, 10, 1e-4, 0.1)
    (head,) = fit(features, np.arange(10) % 3, layout, [point], n_classes=3, embedding=backbone.embedding)
    expected, file = logits(head, features), io.BytesIO()
    section = {"name": "test_vit", "weights": "random", "image_size": 160, "tokens": "grid", "pooling": name}
    save_head(head, file, provenance={"backbone": json.dumps(section)}, classes=3)
    adapter = Adapter.load(file.getvalue())
    assert adapter.aggregation == aggregation
    np.testing.assert_allclose(adapter._logits(IMAGES, 4), expected, rtol=1e-3, atol=1e-3)
    found = adapter.explain(IMAGES[0], 1)
    assert found.logit == pytest.approx(expected[0, 1], rel=1e-3, abs=1e-3)
    assert found.heat.sum() + found.placeless == pytest.approx(sum(found.by_tap.values()), abs=1e-3)
    assert np.abs(found.heat).sum() > 0
    with pytest.raises(UserError, match="check image size, taps and aggregation"):
        Adapter(backbone, head)


def one_feature(column: int, layout: FeatureLayout, target: int) -> Head:
    """A head that reads a single feature, with weight 1."""
    weight, bias = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    point = Hyperparameters("head2toe", target, 0.1, 1)
    return Head(point, 0, np.array([column]), layout, weight, bias, 0.0, raw=True)


def test_heat_is_where_averages_are_and_nothing_else_has_a_place() -> None:
    # A class token and 4 x 4 patches of 2 channels at T = 8: 2 x 2 windows, 8 features behind the token's 2.

    def heat(column: int, aggregation: Aggregation, n_features: int) -> np.ndarray:
        head = one_feature(column, FeatureLayout(("tap",), (n_features,)), 8)
        features, shapes = np.ones(n_features, np.float32), {"tap": (17, 2)}
        found = explain(head, features, shapes, 4, 0, "a", aggregation)
        assert found.heat.sum() + found.placeless == pytest.approx(1)
        return found.heat

    lower_left = np.zeros((4, 4))
    lower_left[2:, :2] = 0.25
    np.testing.assert_allclose(heat(2 + 2 * 2, GRID, 10), lower_left)
    assert not heat(1, GRID, 10).any()
    for name in ("average_max", "average_std"):
        aggregation = Aggregation(tokens="grid", pooling=name)
        np.testing.assert_allclose(heat(2 + 2 * 2, aggregation, 18), lower_left)
        assert not heat(10 + 2 * 2, aggregation, 18).any()
    pyramid = Aggregation(tokens="grid", pooling="pyramid")
    assert not heat(2, pyramid, 12).any()
    np.testing.assert_allclose(heat(4 + 2 * 2, pyramid, 12), lower_left)


def test_what_cannot_be_is_refused_with_the_nearest_choice() -> None:
    with pytest.raises(UserError, match="unknown pooling 'average-max': did you mean average_max"):
        Aggregation(pooling="average-max")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown arrangement of tokens 'grids': did you mean grid"):
        Aggregation(tokens="grids")  # type: ignore[arg-type]
    backbone = load_backbone("test_resnet", weights="random", image_size=64)
    with pytest.raises(UserError, match=r"test_resnet has no tokens to arrange: .*'sequence', got 'grid'"):
        feature_layout(backbone, 64, GRID)


def test_a_section_of_a_recipe_says_it_or_leaves_it_to_the_paper() -> None:
    assert Aggregation.of({"name": "vitb16"}) == Aggregation("normal", "sequence", "average")
    section = {"name": "vitb16", "cls_token": "only_cls", "tokens": "grid", "pooling": "pyramid"}
    assert Aggregation.of(section) == Aggregation("only_cls", "grid", "pyramid")
