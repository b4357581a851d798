"""The parts of a logit: they add up, and lie where their windows lie."""

from dataclasses import replace

import numpy as np
import pytest

from h2t.adapter import Adapter
from h2t.backbones.aggregation import CLASS_TOKEN_TREATMENTS, Aggregation, ClassToken
from h2t.backbones.loading import load_backbone
from h2t.backbones.tap_reader import feature_layout
from h2t.errors import UserError
from h2t.explanation import explain
from h2t.extraction import extract_features
from h2t.features import FeatureLayout
from h2t.head2toe import Head, fit, logits
from h2t.hyperparameters import Hyperparameters

IMAGES = list(np.random.default_rng(0).integers(0, 256, (10, 40, 44, 3), np.uint8))


@pytest.mark.filterwarnings("ignore:.*too small for a pooling window")
@pytest.mark.parametrize(("name", "size"), [("test_resnet", 48), ("test_vit", 160)])
@pytest.mark.parametrize("method", ["head2toe", "all_l2", "linear"])
def test_parts_add_up_to_the_logit(name: str, size: int, method: str) -> None:
    backbone = load_backbone(name, weights="random", image_size=size)
    target = 1024
    features = extract_features(backbone, IMAGES, target)
    point = Hyperparameters(method, target, 0.1, 10, 1e-4, 0.1)
    (head,) = fit(features, np.arange(10) % 3, feature_layout(backbone, target), [point], n_classes=3,
                  embedding=backbone.embedding)  # fmt: skip
    adapter = Adapter(backbone, head, classes=["a", "b", "c"])
    expected = logits(head, features)
    for number, label in ((0, None), (1, 2)):
        found = adapter.explain(IMAGES[number], label)
        wanted = expected[number].argmax() if label is None else label
        assert found.label == "abc"[wanted]
        assert found.logit == pytest.approx(expected[number, wanted], rel=1e-3, abs=1e-3)
        assert found.bias + sum(found.by_tap.values()) == pytest.approx(found.logit)
        assert found.heat.sum() + found.placeless == pytest.approx(sum(found.by_tap.values()), abs=1e-3)
        assert found.heat.shape == (size, size)
        assert found.picture(IMAGES[number]).size == (size, size)
        assert (np.abs(found.heat).sum() > 0) == (method != "linear")


def one_feature(column: int, shape: tuple[int, ...], n_features: int, target: int) -> Head:
    """A head that reads a single feature of a single tap, with weight 3."""
    layout = FeatureLayout(("tap",), (n_features,))
    kept, weight = np.array([column]), np.full((1, 1), 3, np.float32)
    return Head(
        Hyperparameters("head2toe", target, 0.1, 1),
        0,
        kept,
        layout,
        weight,
        np.zeros(1, np.float32),
        0.0,
        raw=True,
    )


def test_a_window_of_a_map_is_where_it_was_pooled() -> None:
    # 4 channels, 8 x 8 positions, 16 features: windows of 4 x 4, ordered by row, column and channel.
    shape, features = (4, 8, 8), np.ones(16, np.float32)
    found = explain(one_feature(9, shape, 16, 16), features, {"tap": shape}, 16, 0, "a")
    expected = np.zeros((16, 16))
    expected[8:, :8] = 3 / 64
    np.testing.assert_allclose(found.heat, expected)
    assert found.placeless == pytest.approx(0)
    pooled_away = explain(one_feature(2, shape, 4, 4), features[:4], {"tap": shape}, 16, 0, "a")
    assert (pooled_away.heat == 0).all()
    assert pooled_away.placeless == pytest.approx(3)


@pytest.mark.parametrize("cls_token", CLASS_TOKEN_TREATMENTS)
def test_a_window_of_tokens_is_a_run_of_patches(cls_token: ClassToken) -> None:
    # A class token and 4 x 4 patches of 2 channels at T = 8: windows of 4 tokens.
    shape, features = (17, 2), np.ones(10, np.float32)
    n_features = {"normal": 8, "only_cls": 2, "nopool_cls": 10}[cls_token]
    column = {"normal": 3, "only_cls": 1, "nopool_cls": 5}[cls_token]
    found = explain(
        one_feature(column, shape, n_features, 8),
        features[:n_features],
        {"tap": shape},
        4,
        0,
        "a",
        Aggregation(cls_token),
    )
    expected = np.zeros(16)
    if cls_token == "normal":
        expected[3:7] = 3 / 4  # tokens 4 to 7, of which the first is the class token
    elif cls_token == "nopool_cls":
        expected[4:8] = 3 / 4  # the second window of the patches alone
    np.testing.assert_allclose(found.heat, expected.reshape(4, 4))


def test_what_has_no_parts_is_refused() -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=48)
    features = extract_features(backbone, IMAGES, 32)
    layout = feature_layout(backbone, 32)
    heads = [
        next(iter(fit(features, np.arange(10) % 2, layout, [Hyperparameters(method, 32, 0.1, 5, 1e-4, 0.1)],
                      n_classes=2, embedding=backbone.embedding)))
        for method in ("all_l2", "knn")
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"expected a label in 0\.\.1, got 2"):
        Adapter(backbone, heads[0]).explain(IMAGES[0], 2)
    with pytest.raises(UserError, match="only linear heads"):
        Adapter(backbone, replace(heads[1])).explain(IMAGES[0])
