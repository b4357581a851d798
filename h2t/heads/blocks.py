"""Groups of linear heads that are trained side by side, and how their weights are cut into blocks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from h2t.features import FeatureLayout
from h2t.heads.spec import HeadSpec


@dataclass
class HeadStack:
    """Trained heads, in the order of their specs.

    ``weight`` float32 [n_heads, n_features, n_classes], ``bias`` float32 [n_heads, n_classes], ``train_loss``
    float32 [n_heads]: the mean cross-entropy over the training rows, in nats.
    """

    weight: Tensor
    bias: Tensor
    train_loss: Tensor


def initial_weights(seed: int, n_features: int, n_classes: int) -> np.ndarray:
    """Glorot-uniform weights float32 [n_features, n_classes], the same on every machine and device."""
    limit = math.sqrt(6 / (n_features + n_classes))
    weight = np.random.default_rng(seed).random((n_features, n_classes), dtype=np.float32)
    weight *= 2 * limit
    weight -= limit
    return weight


@dataclass(frozen=True)
class HeadGroup:
    """Heads on the same features and where they start, by default at random.

    ``features`` [n_samples, n_features] for all heads, or [n_heads, n_samples, n_features], float32 or what
    the products are to be computed in; ``specs`` ordered by regularizer; ``layout``: the taps of the columns,
    for ``layergroup`` (default: one tap); ``weight`` float32 [n_heads, n_features, n_classes]; ``bias``
    float32 [n_heads, n_classes].
    """

    features: Tensor
    specs: Sequence[HeadSpec]
    layout: FeatureLayout | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def n_features(self) -> int:
        """The number of columns."""
        return self.features.shape[-1]

    def first_weight(self, head: int, n_classes: int) -> Tensor:
        """The weights that a head starts from, float32 [n_features, n_classes]."""
        if self.weight is not None:
            return self.weight[head]
        return torch.from_numpy(initial_weights(self.specs[head].seed, self.n_features, n_classes))


@dataclass(frozen=True)
class Span:
    """Feature columns start..stop of a group, for the rows ``class_rows`` of the stacked weights.

    The stacked weights have one row per head and class.
    """

    group: int
    start: int
    stop: int
    class_rows: slice

    @property
    def n_rows(self) -> int:
        """The number of class rows."""
        return self.class_rows.stop - self.class_rows.start

    @property
    def stride(self) -> int:
        """Numbers from one class row to the next in memory."""
        return aligned(self.stop - self.start)

    @property
    def size(self) -> int:
        """Numbers that the weights take in memory."""
        return self.n_rows * self.stride


def aligned(length: int) -> int:
    """``length`` of float32 rounded up to whole 16 bytes, at which every row begins.

    The library's products of small matrices round by where in memory these lie.
    """
    return -(-length // 4) * 4


# Heads side by side for which a span is a whole block; of fewer heads, several spans share one.
HEADS_PER_BLOCK = 32


def cut_spans(groups: Sequence[HeadGroup], n_classes: int, largest: int) -> Iterator[list[Span]]:
    """All weights, cut into blocks of about ``largest`` of them; small spans share a block.

    The columns at which a group is cut depend on neither the number of its heads nor on other groups: logits
    are summed span by span, so that other cuts would round otherwise.
    """
    block: list[Span] = []
    row = 0
    width = max(largest // (HEADS_PER_BLOCK * n_classes) // 64 * 64, 256)
    for number, group in enumerate(groups):
        class_rows = slice(row, row := row + len(group.specs) * n_classes)
        for start, stop in pairwise([*range(0, group.n_features, width), group.n_features]):
            span = Span(number, start, stop, class_rows)
            if block and sum(earlier.size for earlier in block) + span.size > largest:
                yield block
                block = []
            block.append(span)
    yield block


@dataclass(frozen=True)
class SpanViews:
    """The views that the matrix products and regularizers of one span use.

    They are made once: making them in every step would take longer than a small product does.

    One per batch: ``columns`` [b, width], ``transposed`` [width, b], ``error`` and ``logits``
    [n_class_rows, b]. ``grad_lp`` and ``weight_lp`` [n_class_rows, width]: gradient and weights in the
    precision of the products. Where each head has features of its own, all these are [n_heads, ..., ...],
    with the class rows of one head. ``gradient`` and ``weight`` float32 [n_class_rows, width].
    """

    span: Span
    columns: list[Tensor]
    transposed: list[Tensor]
    error: list[Tensor]
    logits: list[Tensor]
    grad_lp: Tensor
    weight_lp: Tensor
    gradient: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Block:
    """Spans whose weights lie side by side and are updated by one call.

    ``stored``: flat weights, moments and squares; ``state``: the same on the device.
    """

    stored: list[Tensor]
    state: list[Tensor]
    gradient: Tensor
    grad_lp: Tensor
    weight_lp: Tensor
    views: list[SpanViews]


def split_spans(flat: Tensor, spans: Sequence[Span]) -> list[Tensor]:
    """Views of each span's part, [n_class_rows, width], of a flat tensor that begins with all parts."""
    sizes = [span.size for span in spans]
    parts = flat[: sum(sizes)].split(sizes)
    return [
        part.view(span.n_rows, span.stride)[:, : span.stop - span.start]
        for part, span in zip(parts, spans, strict=True)
    ]
