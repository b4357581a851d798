"""The regularizers' gradients, added to that of the loss while a block of weights is in the cache."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from h2t.features import FeatureLayout
from h2t.heads.blocks import HeadGroup, SpanViews
from h2t.heads.spec import HeadSpec, Regularizer

SMALLEST = 1e-30  # of a squared norm: a row or tap of zeros has the gradient zero


class Penalties:
    """The regularizers of a group of heads.

    The weights come divided by their head's rate. That matters for ``l2`` alone, whose coefficient is
    multiplied by the rate: a sign, or a row or tap divided by its norm, is the same without it.

    ``layergroup`` needs the norm of a whole tap, which may lie in several blocks. So the squares are added up
    by :meth:`measure_taps` as each block is updated, for the next step, which :meth:`begin_step` opens.

    ``buffer`` float32, of the size of the largest block, and ``norms``, ``n_classes`` times smaller, are
    scratch memory.
    """

    def __init__(self, group: HeadGroup, n_classes: int, buffer: Tensor, norms: Tensor) -> None:
        self.n_classes, self.buffer, self.norms = n_classes, buffer, norms
        device = group.features.device
        self.class_rows, self.coefficients = _by_regularizer(group.specs, n_classes, device)
        self.by_tap = "layergroup" in self.class_rows
        if self.by_tap:
            self.layout = group.layout or FeatureLayout(("all",), (group.n_features,))
            self.tap_of_column = torch.from_numpy(self.layout.tap_of(np.arange(group.n_features))).to(device)
            n_heads = len(self.coefficients["layergroup"])
            self.squared_norms = torch.zeros(n_heads, len(self.layout.taps), device=device)
            self.tap_scale = torch.zeros_like(self.squared_norms)

    def add_gradients(self, views: SpanViews, batch_fraction: float) -> None:
        """Add to the gradient of a span, weighed by how full the batch is."""
        for regularizer, rows in self.class_rows.items():
            gradient, weight = views.gradient[rows], views.weight[rows]
            coefficient = self.coefficients[regularizer]
            if regularizer == "l2":
                gradient.addcmul_(weight, coefficient, value=batch_fraction)
            elif regularizer == "l1":
                sign = torch.sign(weight, out=self.buffer[: weight.numel()].view(weight.shape))
                gradient.addcmul_(sign, coefficient, value=batch_fraction)
            else:
                by_head = (-1, self.n_classes, weight.shape[1])
                if regularizer == "l21":
                    scale = self._squared_row_norms(weight)
                    scale.clamp_(min=SMALLEST).rsqrt_().mul_(coefficient)
                else:
                    taps = self.tap_of_column[views.span.start : views.span.stop]
                    scale = torch.index_select(self.tap_scale, 1, taps)
                gradient.view(by_head).addcmul_(weight.view(by_head), scale[:, None], value=batch_fraction)

    def begin_step(self) -> None:
        """Turn the squares of all taps into the factors coefficient / norm of the step that begins."""
        torch.clamp(self.squared_norms, min=SMALLEST, out=self.tap_scale)
        self.tap_scale.rsqrt_().mul_(self.coefficients["layergroup"])
        self.squared_norms.zero_()

    def measure_taps(self, views: SpanViews) -> None:
        """Add a span's part to the squared norms of its taps."""
        squares = self._squared_row_norms(views.weight[self.class_rows["layergroup"]])
        first, last = self.layout.tap_of(np.array([views.span.start, views.span.stop - 1])).tolist()
        ends = np.clip(self.layout.offsets[first : last + 2], views.span.start, views.span.stop)
        by_tap = [columns.sum(1) for columns in squares.split(np.diff(ends).tolist(), 1)]
        self.squared_norms[:, first : last + 1] += torch.stack(by_tap, 1)

    def _squared_row_norms(self, weight: Tensor) -> Tensor:
        """Sums over classes of squared weights, float32 [n_heads, width], in the memory of ``norms``."""
        squares = torch.mul(weight, weight, out=self.buffer[: weight.numel()].view(weight.shape))
        sums = self.norms[: weight.numel() // self.n_classes].view(-1, weight.shape[1])
        return torch.sum(squares.view(-1, self.n_classes, weight.shape[1]), 1, out=sums)


def _by_regularizer(
    specs: Sequence[HeadSpec], n_classes: int, device: torch.device
) -> tuple[dict[str, slice], dict[str, Tensor]]:
    """The class rows of each regularizer's heads, and their coefficients as a column.

    The coefficients of ``l1`` and ``l2`` are one per class row, those of norms one per head.
    """
    class_rows, coefficients = {}, {}
    for name in get_args(Regularizer):
        heads = [head for head, spec in enumerate(specs) if spec.regularizer == name]
        if any(specs[head].coefficient for head in heads):
            assert heads[-1] - heads[0] < len(heads), "specs are ordered by regularizer"
            scale = [2 * specs[head].learning_rate if name == "l2" else 1.0 for head in heads]
            values = [specs[head].coefficient * s for head, s in zip(heads, scale, strict=True)]
            column = torch.tensor(values, device=device)[:, None]
            class_rows[name] = slice(heads[0] * n_classes, (heads[-1] + 1) * n_classes)
            coefficients[name] = column.repeat_interleave(n_classes, 0) if name in ("l1", "l2") else column
    return class_rows, coefficients
