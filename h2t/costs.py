"""Floating-point operations and bytes that adapting to one task takes: the model of Appendix B.

Appendix B leaves its constants out. These reproduce every printed digit of Table 3:

- a product of n x m by m x k counts 2 n m k operations; a backward pass costs twice a forward pass;
- frozen features are computed once, for the 1000 training images: one forward pass each;
- a step on a head of N features and C classes takes 4 N C operations an image: the forward product and the
  gradient with respect to the weights, as no gradient with respect to the features is needed;
- a step of fine-tuning takes 3 (forward pass + 2 D C) operations an image, D the width of the embedding;
- Table 3 counts the training over all features, neither the search for F nor the head over kept features; we
  count the latter where there is no training over all features;
- weights are 4 bytes, a head is kept without its bias, the kept features are a bitmap of N bits, and a
  fine-tuned model is its backbone and a head on its embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch.utils.flop_counter import FlopCounterMode

from h2t.backbones.loading import Backbone
from h2t.backbones.tap_reader import feature_layout, look_at_taps
from h2t.errors import UserError
from h2t.features import FeatureLayout, default_embedding
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS, Method

BYTES_PER_WEIGHT = 4
TRAINING_IMAGES = 1000
BATCH_SIZE = 128


@dataclass(frozen=True)
class BackboneCost:
    """The figures of a backbone on which all costs rest.

    ``forward_flops``: of one image; ``parameters``: without the pretrained head; ``embedding_width``: the
    number of features that a head on the embedding reads.
    """

    forward_flops: int
    parameters: int
    embedding_width: int


@dataclass(frozen=True)
class HeadSize:
    """A task's head: ``n_features`` of all taps, ``n_kept`` of them used by it in the end, ``n_classes``."""

    n_features: int
    n_kept: int
    n_classes: int


def measure_backbone(backbone: Backbone) -> BackboneCost:
    """Operations of one forward pass of one image by PyTorch's counter, and the number of parameters."""
    weight = next(backbone.model.parameters())
    size = backbone.image_size
    image = torch.zeros((1, 3, size, size), device=weight.device, dtype=weight.dtype)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        backbone.model(image)
    layout = feature_layout(backbone, target_size=1)
    width = layout.widths[layout.taps.index(backbone.embedding)]
    return BackboneCost(counter.get_total_flops(), _parameters(backbone.model), width)


def features_flops(cost: BackboneCost, n_images: int = TRAINING_IMAGES) -> int:
    """C_I: one forward pass of every training image."""
    return cost.forward_flops * n_images


def head_flops(n_features: int, n_classes: int, steps: int, batch_size: int = BATCH_SIZE) -> int:
    """C_all t: training a linear head on ``n_features`` frozen features for ``steps`` steps."""
    return 4 * n_features * n_classes * batch_size * steps


def finetuning_flops(
    cost: BackboneCost, n_features: int, n_classes: int, steps: int, batch_size: int = BATCH_SIZE
) -> int:
    """Training the backbone and a head on ``n_features`` of its features for ``steps`` steps."""
    return 3 * (cost.forward_flops + 2 * n_features * n_classes) * batch_size * steps


def training_flops(
    method: str,
    cost: BackboneCost,
    head: HeadSize,
    steps: int,
    *,
    finetuning_steps: int | None = None,
    n_images: int = TRAINING_IMAGES,
    batch_size: int = BATCH_SIZE,
) -> int:
    """Operations of adapting to one task with chosen hyperparameters, in the accounting of Table 3.

    For methods that keep features and then train the backbone, ``steps`` are those of the scoring and
    ``finetuning_steps`` those of the second part (``steps`` if not given).
    """
    definition = METHODS[method]
    read = _features_read(definition, cost, head)
    scored = head.n_features if definition.features == "kept" and definition.scored else read
    products = read if definition.features != "kept" else scored + read  # of all pairs of rows
    solving = 2 * n_images**2 * products if definition.solver else 0
    frozen = features_flops(cost, n_images) + head_flops(scored, head.n_classes, steps, batch_size) + solving
    if not definition.trains_backbone:
        return frozen
    training = finetuning_flops(cost, read, head.n_classes, finetuning_steps or steps, batch_size)
    return training + (frozen if definition.features == "kept" else 0)


def fitting_flops(
    points: Sequence[Hyperparameters],
    layout: FeatureLayout,
    embedding: str,
    n_classes: int,
    n_images: int = TRAINING_IMAGES,
    batch_size: int = BATCH_SIZE,
) -> int:
    """Operations of :func:`h2t.head2toe.fit` for points of one target size: what they share counts once."""
    total, batch = 0, min(batch_size, n_images)
    for _, group in groupby(sorted(points, key=shared_training), shared_training):
        members = list(group)
        method, steps = METHODS[members[0].method], members[0].steps
        on_embedding = method.features == "embedding"
        n_read = layout.widths[layout.taps.index(embedding)] if on_embedding else layout.n_features
        if method.solver:
            passes = 1 + max(int(point.coefficient) for point in members) if method.by_tap else 1
            total += 2 * n_images**2 * n_read * passes
        elif method.scored:
            total += head_flops(n_read, n_classes, steps, batch)
        n_kept = sum(int(n_read * p.keep_fraction) for p in members if METHODS[p.method].features == "kept")
        total += head_flops(n_kept, n_classes, steps, batch)
    return total


def shared_training(point: Hyperparameters) -> str:
    """What points have in common that share their training on all features, or on the embedding."""
    method = METHODS[point.method]
    coefficient = None if method.by_tap else point.coefficient  # which is how far one solution goes on
    parts = (method.regularizer, point.target_size, point.learning_rate, point.steps, coefficient,
             method.normalization, method.scored, method.solver, method.features == "embedding")  # fmt: skip
    return str(parts)


def storage_bytes(method: str, cost: BackboneCost, head: HeadSize) -> int:
    """Bytes to keep for one task: the head, a bitmap of kept features, and a backbone that was trained."""
    definition = METHODS[method]
    weights = _features_read(definition, cost, head) * head.n_classes
    weights += cost.parameters if definition.trains_backbone else 0
    bitmap = -(-head.n_features // 8) if definition.features == "kept" else 0
    return BYTES_PER_WEIGHT * weights + bitmap


def _features_read(method: Method, cost: BackboneCost, head: HeadSize) -> int:
    """The number of features that the final head reads."""
    widths = {"embedding": cost.embedding_width, "all": head.n_features, "kept": head.n_kept}
    return widths[method.features]


def _parameters(model: torch.nn.Module) -> int:
    """Number of parameters, without those of the pretrained head."""
    head = getattr(model, "get_classifier", torch.nn.Identity)()
    return sum(weight.numel() for weight in model.parameters()) - sum(
        weight.numel() for weight in head.parameters()
    )


def flops_up_to(backbone: Backbone) -> dict[str, int]:
    """Per tap, the operations of a forward pass of one image that ends with it, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        return look_at_taps(backbone, lambda activation: counter.get_total_flops())


def tap_depths(backbone: Backbone) -> dict[str, float]:
    """Per tap, the share of the multiply-adds of a pass through all taps after which it is read, 0 to 1."""
    flops = flops_up_to(backbone)
    whole = max(flops.values())
    return {tap: operations / whole for tap, operations in flops.items()}


def within_depth(backbone: Backbone, max_depth: float | None) -> Backbone:
    """The backbone with the taps that ``max_depth`` of a forward pass reaches; None: all of them.

    A pass that reads these ends behind the last of them (``h2t.backbones.tap_reader``). The embedding, which
    comes last, is not among them unless ``max_depth`` is 1; the last of them stands in its place. Raises
    UserError for a share outside (0, 1], and for one that reaches no tap.
    """
    if max_depth is None:
        return backbone
    if not 0 < max_depth <= 1:
        raise UserError(f"max_depth: expected a share of a forward pass in (0, 1], got {max_depth}")
    depths = tap_depths(backbone)
    taps = [tap for tap, depth in depths.items() if depth <= max_depth]
    if not taps:
        least = math.ceil(1000 * min(depths.values())) / 1000
        raise UserError(
            f"max_depth {max_depth:g} of a forward pass ends before the first tap of {backbone.name}; "
            f"expected {least:g} to 1"
        )
    return replace(backbone.only(taps), embedding=default_embedding(taps))
