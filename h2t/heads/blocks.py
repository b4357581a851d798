"""Groups of linear heads that are trained side by side, and how their weights are cut into blocks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

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
class Group:
    """Heads on the same features and where they start, by default at random.

    ``features`` [n_samples, n_features] for all heads, or [n_heads, n_samples, n_features], float32 or what
    the products are to be computed in; ``specs`` ordered by regularizer; ``weight`` float32 [n_heads,
    n_features, n_classes]; ``bias`` float32 [n_heads, n_classes].
    """

    features: Tensor
    specs: Sequence[HeadSpec]
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def n_features(self) -> int:
        """The number of columns."""
        return self.features.shape[-1]

    def first_weight(self, head: int, n_classes: int) -> Tensor:
        """Where a head starts, float32 [n_features, n_classes]."""
        if self.weight is not None:
            return self.weight[head]
        return torch.from_numpy(initial_weights(self.specs[head].seed, self.n_features, n_classes))


@dataclass(frozen=True)
class Span:
    """Columns start..stop of a group; its *lines* are one for each class of each head."""

    group: int
    start: int
    stop: int
    lines: slice

    @property
    def size(self) -> int:
        return (self.lines.stop - self.lines.start) * (self.stop - self.start)


def cut_spans(groups: Sequence[Group], n_classes: int, largest: int) -> Iterator[list[Span]]:
    """All weights, cut into blocks of at most about ``largest`` of them; small groups share a block."""
    block: list[Span] = []
    line = 0
    for number, group in enumerate(groups):
        lines = slice(line, line := line + len(group.specs) * n_classes)
        width = max(largest // (lines.stop - lines.start) // 64 * 64, 128)
        for start, stop in pairwise([*range(0, group.n_features, width), group.n_features]):
            span = Span(number, start, stop, lines)
            if block and sum(each.size for each in block) + span.size > largest:
                yield block
                block = []
            block.append(span)
    yield block


@dataclass(frozen=True)
class Piece:
    """Views for the products of a span: made at every step, they would take longer than small products.

    One per batch: ``columns`` [b, width], ``transposed`` [width, b], ``error`` and ``logits`` [n_lines, b].
    ``product`` and ``factor`` [n_lines, width]: the gradient and the weights as the products have them. Where
    each head has features of its own, all these are [n_heads, ..., ...], with the lines of one head.
    ``gradient`` and ``weight`` [n_lines, width]: what the regularizers see.
    """

    span: Span
    columns: list[Tensor]
    transposed: list[Tensor]
    error: list[Tensor]
    logits: list[Tensor]
    product: Tensor
    factor: Tensor
    gradient: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Block:
    """Pieces whose weights lie side by side and are updated by one call.

    ``stored``: flat weights, moments and squares; ``state``: the same on the device.
    """

    stored: list[Tensor]
    state: list[Tensor]
    gradient: Tensor
    product: Tensor
    factor: Tensor
    pieces: list[Piece]


def lines_of(flat: Tensor, spans: Sequence[Span]) -> list[Tensor]:
    """The part of each span, [n_lines, width], of what has a number for every weight of a block."""
    parts = flat.split([span.size for span in spans])
    return [part.view(-1, span.stop - span.start) for part, span in zip(parts, spans, strict=True)]
