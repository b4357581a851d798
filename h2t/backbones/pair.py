"""Two networks that see the same images: the taps of the first, and the embedding of the second."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.tap import Tap
from h2t.costs import within_depth
from h2t.errors import UserError

SECOND_EMBEDDING = "second_pre_logits"
ARGUMENTS = (
    "name",
    "weights",
    "image_size",
    "taps",
    "precision",
    "sha256",
)  # of a section, for load_backbone


class _Pair(nn.Module):
    """Both networks in turn; ``scale`` and ``shift`` [1, 3, 1, 1] fit the images to the second."""

    scale: Tensor
    shift: Tensor

    def __init__(self, first: nn.Module, second: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.num_prefix_tokens = getattr(first, "num_prefix_tokens", 0)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> None:
        """Run both for their hooks."""
        self.first(images)
        self.second(images * self.scale + self.shift)


def pair(first: Backbone, second: Backbone, *, own_normalization: bool = True) -> Backbone:
    """The first backbone with the embedding of the second as its last tap, ``second_pre_logits``.

    ``own_normalization``: images come normalised for the first and are renormalised for the second; else
    both see them as they come. Raises UserError for networks of different image sizes.
    """
    if first.image_size != second.image_size:
        raise UserError(
            f"a second backbone needs the images of the first: expected {first.image_size} pixels, "
            f"{second.name} takes {second.image_size}"
        )
    like = next(first.model.parameters())
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (first.mean, first.std))
    other_mean, other_std = (torch.tensor(values).view(1, 3, 1, 1) for values in (second.mean, second.std))
    scale = std / other_std if own_normalization else torch.ones(1, 3, 1, 1)
    shift = (mean - other_mean) / other_std if own_normalization else torch.zeros(1, 3, 1, 1)
    model = _Pair(first.model, second.model, scale.to(like), shift.to(like))
    (embedding,) = (tap for tap in second.taps if tap.name == second.embedding)
    taps = (*(_inside("first", tap) for tap in first.taps),
            replace(_inside("second", embedding), name=SECOND_EMBEDDING))  # fmt: skip
    weights = f"{first.weights}; second: {second.name}, {second.weights}"
    return replace(first, model=model.eval().requires_grad_(False), taps=taps, weights=weights)


EMBEDDINGS = "embeddings"  # the taps of a section that has a second network: the embeddings of both


def load_section(section: Mapping[str, Any], device: str = "cpu") -> Backbone:
    """The backbone of a recipe's section of that name, with the second network or the depth that it may name.

    Raises UserError as ``load_backbone`` and ``within_depth`` do.
    """
    second = section.get("second")
    stated = {name: section[name] for name in ARGUMENTS if section.get(name)}
    if not second:
        return within_depth(load_backbone(**stated, device=device), section.get("max_depth"))
    alone = stated.get("taps") == EMBEDDINGS
    first = load_backbone(**{**stated, **({"taps": "auto"} if alone else {})}, device=device)
    other = {name: second[name] for name in ARGUMENTS if second.get(name)}
    other |= {"image_size": first.image_size, "precision": stated.get("precision", "float32")}
    own = section.get("normalization", "backbone") == "backbone"
    both = pair(first, load_backbone(**other, device=device), own_normalization=own)
    return embeddings_alone(both) if alone else both


def embeddings_alone(backbone: Backbone) -> Backbone:
    """The same with the embeddings of both networks as its only taps."""
    return backbone.only((backbone.embedding, SECOND_EMBEDDING))


def _inside(part: str, tap: Tap) -> Tap:
    prepend = f"{part}.{tap.prepend}" if tap.prepend else ""
    return replace(tap, module=f"{part}.{tap.module}".rstrip("."), prepend=prepend)
