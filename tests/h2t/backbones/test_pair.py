"""Two networks side by side: each tap is what the network alone gives."""

import pytest
import torch

from h2t.backbones.loading import load_backbone
from h2t.backbones.pair import SECOND_EMBEDDING, embeddings_alone, pair
from h2t.backbones.tap_reader import TapReader, feature_layout
from h2t.errors import UserError


def test_every_tap_is_that_of_the_network_alone() -> None:
    first = load_backbone("test_efficientnet", weights="random", image_size=64)
    second = load_backbone("test_resnet", weights="random", image_size=64, seed=1)
    second.mean, second.std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    pixels = torch.rand(2, 3, 64, 64)

    def normalised(backbone: object) -> torch.Tensor:
        mean, std = (torch.tensor(getattr(backbone, name)).view(1, 3, 1, 1) for name in ("mean", "std"))
        return (pixels - mean) / std

    alone = TapReader(first, [16])(normalised(first))[16]
    others = dict(
        zip(feature_layout(second, 16).taps, TapReader(second, [16])(normalised(second))[16], strict=True)
    )
    both = pair(first, second)
    together = TapReader(both, [16])(normalised(first))[16]
    assert [tap.name for tap in both.taps] == [*(tap.name for tap in first.taps), SECOND_EMBEDDING]
    for ours, theirs in zip(together, [*alone, others["pre_logits"]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert both.embedding == "pre_logits"
    assert [tap.name for tap in embeddings_alone(both).taps] == ["pre_logits", SECOND_EMBEDDING]
    assert (
        feature_layout(embeddings_alone(both), 16).n_features
        == alone[-2].shape[1] + others["pre_logits"].shape[1]
    )


def test_images_of_another_size_are_refused() -> None:
    first = load_backbone("test_efficientnet", weights="random", image_size=64)
    second = load_backbone("test_resnet", weights="random", image_size=32)
    with pytest.raises(UserError, match="expected 64 pixels, test_resnet takes 32"):
        pair(first, second)
