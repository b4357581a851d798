"""Many trained heads applied to the same images in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from h2t.features import FeatureLayout, select, unit_norm
from h2t.methods import Head


@dataclass(frozen=True)
class _Group:
    """Heads on the same kept features: their weights side by side, [n_kept, n_heads * n_classes]."""

    target_size: int
    layout: FeatureLayout
    kept: np.ndarray
    weight: Tensor
    bias: Tensor
    places: list[int]

    def logits(self, features: Tensor) -> Tensor:
        """[b, n_heads, n_classes] of raw features [b, n_features]."""
        everything = len(self.kept) == self.layout.n_features
        chosen = unit_norm(features, self.layout) if everything else select(features, self.layout, self.kept)
        return torch.addmm(self.bias, chosen, self.weight).unflatten(1, (len(self.places), -1))


class HeadBank:
    """Heads of one task on one device; those that keep the same features share selection and product."""

    def __init__(self, heads: Sequence[Head], device: str = "cpu") -> None:
        grouped: dict[tuple[int, bytes], list[int]] = {}
        for place, head in enumerate(heads):
            grouped.setdefault((head.settings.target_size, head.kept.tobytes()), []).append(place)
        self.n_heads = len(heads)
        self.target_sizes = sorted({head.settings.target_size for head in heads})
        self.groups = [_group(heads, places, device) for places in grouped.values()]

    def predict(self, features: Mapping[int, Tensor]) -> np.ndarray:
        """Predicted classes int32 [b, n_heads] of raw features: float32 [b, n_features] per target size."""
        size = next(iter(features.values())).shape[0]
        predictions = np.empty((size, self.n_heads), np.int32)
        for group in self.groups:
            classes = group.logits(features[group.target_size]).argmax(2)
            predictions[:, group.places] = classes.cpu().numpy()
        return predictions


def _group(heads: Sequence[Head], places: list[int], device: str) -> _Group:
    heads = [heads[place] for place in places]
    first = heads[0]
    weight = torch.from_numpy(np.concatenate([head.weight for head in heads], axis=1)).to(device)
    bias = torch.from_numpy(np.concatenate([head.bias for head in heads])).to(device)
    return _Group(first.settings.target_size, first.layout, first.kept, weight, bias, places)
