from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.loading import load_backbone
from h2t.backbones.tap_reader import feature_layout
from h2t.errors import UserError
from h2t.extraction import extract_features, preprocessing_config, preprocessing_for, write_features
from h2t.images.source import BadImage

SIZE, TARGET = 48, 32


@pytest.mark.parametrize("normalization", ["backbone", "imagenet", "minus_one_to_one"])
@pytest.mark.parametrize(
    ("name", "image_size"), [("resnet50", None), ("efficientnet_lite0", 64), ("test_vit", None)]
)
def test_preprocessing_is_known_without_the_network(
    monkeypatch: pytest.MonkeyPatch, name: str, image_size: int | None, normalization: str
) -> None:
    backbone = load_backbone(name, weights="random", image_size=image_size)
    monkeypatch.delattr("timm.create_model")
    given = preprocessing_config(name, image_size, "bicubic", normalization)
    assert given == preprocessing_for(backbone, "bicubic", normalization)
    assert given.image_size == backbone.image_size


def test_preprocessing_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="unknown normalization 'image_net': did you mean imagenet"):
        preprocessing_config("resnet50", normalization="image_net")
    with pytest.raises(UserError, match="unknown backbone 'resnet51'"):
        preprocessing_config("resnet51")
    with pytest.raises(UserError, match="image_size: expected 1 pixel or more, got 0"):
        preprocessing_config("resnet50", 0)


def test_features_are_the_same_whatever_the_batch() -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=SIZE)
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (side, side + 5, 3), np.uint8) for side in random.integers(30, 60, 24)]
    features = extract_features(backbone, images, TARGET)
    np.testing.assert_allclose(extract_features(backbone, images, TARGET, batch_size=5), features, atol=1e-5)
    assert features.shape == (24, feature_layout(backbone, TARGET).n_features)
    assert extract_features(backbone, [], TARGET).shape == (0, features.shape[1])


@pytest.mark.parametrize("aggregation", [PAPER, Aggregation(pooling="average_std")])
def test_features_are_streamed_to_parquet_whole_or_not_at_all(
    aggregation: Aggregation, tmp_path: Path
) -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=SIZE)
    images = list(np.random.default_rng(0).integers(0, 256, (7, 40, 44, 3), np.uint8))
    path = write_features(
        backbone, images, TARGET, tmp_path / "f.parquet", batch_size=3, aggregation=aggregation
    )
    rows, layout = pd.read_parquet(path), feature_layout(backbone, TARGET, aggregation)
    assert list(rows.columns) == ["index", *layout.taps]
    assert rows["index"].tolist() == list(range(7))
    stored = np.concatenate([np.stack(rows[tap]) for tap in layout.taps], axis=1)
    features = extract_features(backbone, images, TARGET, aggregation=aggregation)
    np.testing.assert_allclose(stored, features, atol=1e-5)
    with pytest.raises(BadImage):
        write_features(backbone, [*images, b"junk"], TARGET, tmp_path / "g.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["f.parquet"]
