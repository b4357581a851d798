"""Groups of linear heads that are trained together, mini-batch by mini-batch.

The weights of all heads lie in blocks of features, ``[n_heads * n_classes, width]`` each, so that the
gradient, the regularizer, Adam's update and the next batch's share of the logits of a block are computed
while it is in the cache: a step reads every weight from memory once, and a whole gradient never exists.
Small heads on features of their own share a block, so that one call updates many of them.

Weights are kept divided by their head's learning rate. The size of Adam's step does not depend on the scale
of the weights, so heads of different rates then take the same step and are updated together.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import torch
from torch import Tensor

from h2t.heads.blocks import Block, Group, HeadStack, Piece, Span, cut_spans, lines_of
from h2t.heads.spec import HeadSpec, Regularizer

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-7
BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}  # of weights: on a CPU a block and its moments stay in the cache


class Batches:
    """Labels int64 [n_samples] cut into mini-batches of ``size``, used over and over in this order."""

    def __init__(self, targets: Tensor, n_classes: int, size: int) -> None:
        self.targets, self.n_classes, self.size, self.n_samples = targets, n_classes, size, len(targets)
        starts = range(0, self.n_samples, size)
        self.samples = [slice(start, min(start + size, self.n_samples)) for start in starts]
        misses = torch.nn.functional.one_hot(targets, n_classes).float() / -size
        self.misses = [misses[batch].T.contiguous() for batch in self.samples]


class HeadTrainer:
    """Groups of heads that all take the same number of steps, with their optimizer state.

    ``offload`` keeps all but a block of the state away from the device.
    """

    def __init__(self, batches: Batches, groups: Sequence[Group], *, offload: bool = False) -> None:
        self.batches, self.groups, self.device = batches, groups, batches.targets.device
        specs = [spec for group in groups for spec in group.specs]
        self.steps, self.n_classes, self.n_heads = specs[0].steps, batches.n_classes, len(specs)
        self.dtype, self.offload = groups[0].features.dtype, offload
        rates = torch.tensor([spec.learning_rate for spec in specs], device=self.device)
        self.rate = rates.repeat_interleave(self.n_classes)[:, None]
        self.penalties = [_penalties(group.specs, self.n_classes, self.device) for group in groups]
        spans = list(cut_spans(groups, self.n_classes, BLOCK_BYTES[self.device.type] // 4))
        sizes = [sum(span.size for span in block) for block in spans]
        self.weights = self._state(sum(sizes))
        self._start(spans, sizes)
        # Only now, so that memory peaks only once.
        self.moments, self.squares = self._state(sum(sizes)), self._state(sum(sizes))
        self._make_buffers(max(sizes))
        self.blocks = list(self._blocks(spans, sizes))
        self._forward(0)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _state(self, size: int) -> Tensor:
        """Zeros for every weight; away from the device if that has no room for them."""
        if not self.offload:
            return self._zeros(size)
        if self.device.type != "cpu":
            return torch.zeros(size, pin_memory=True)
        with tempfile.NamedTemporaryFile(prefix="h2t-") as file:
            # The file loses its name at once, and its space when it is no longer mapped.
            return torch.from_file(file.name, shared=True, size=size)

    def _start(self, spans: list[list[Span]], sizes: list[int]) -> None:
        """Set the first weights and biases."""
        self.bias = self._zeros(self.n_heads * self.n_classes)
        for number, group in enumerate(self.groups):
            own = [pair for pair in self._parts(self.weights, spans, sizes) if pair[0].group == number]
            for head, spec in enumerate(group.specs):
                first = group.first_weight(head, self.n_classes)
                lines = slice(head * self.n_classes, (head + 1) * self.n_classes)
                for span, weight in own:
                    weight[lines].copy_(first[span.start : span.stop].T).div_(spec.learning_rate)
            if group.bias is not None:
                lines = own[0][0].lines
                self.bias[lines].copy_(group.bias.reshape(-1)).div_(self.rate[lines, 0])

    def _parts(
        self, flat: Tensor, spans: list[list[Span]], sizes: list[int]
    ) -> Iterator[tuple[Span, Tensor]]:
        """Each span with its part of what is stored for every weight, [n_lines, width]."""
        for block, part in zip(spans, flat.split(sizes), strict=True):
            yield from zip(block, lines_of(part, block), strict=True)

    def _make_buffers(self, largest: int) -> None:
        n_lines, lengths = self.n_heads * self.n_classes, [s.stop - s.start for s in self.batches.samples]
        self.count = self._zeros()
        self.bias_gradient, self.bias_moments, self.bias_squares = (self._zeros(n_lines) for _ in range(3))
        self.gradient, self.spare = self._zeros(largest), self._zeros(largest)
        self.norms = self._zeros(largest // self.n_classes)
        self.staged = [self._zeros(largest) for _ in range(3)] if self.offload else []
        self.rough = self._zeros(largest, dtype=self.dtype) if self.dtype != torch.float32 else None
        memory = self._zeros(2, n_lines * max(lengths))
        rough = self._zeros(n_lines * max(lengths), dtype=self.dtype) if self.rough is not None else memory[1]
        # A contiguous [n_lines, length] for each batch, all in the same memory.
        self.logits, self.error, self.rough_error = (
            [buffer[: n_lines * length].view(n_lines, length) for length in lengths]
            for buffer in (*memory, rough)
        )

    def _blocks(self, spans: list[list[Span]], sizes: list[int]) -> Iterator[Block]:
        states = (self.weights, self.moments, self.squares)
        for block, *stored in zip(spans, *(state.split(sizes) for state in states), strict=True):
            size = len(stored[0])
            state = [buffer[:size] for buffer in self.staged] or stored
            gradient = self.gradient[:size]
            product = gradient if self.rough is None else self.rough[:size]
            factor = state[0] if self.rough is None else self.rough[:size]
            tensors = [lines_of(flat, block) for flat in (product, factor, gradient, state[0])]
            pieces = [self._piece(span, *own) for span, *own in zip(block, *tensors, strict=True)]
            yield Block(stored, state, gradient, product, factor, pieces)

    def _piece(self, span: Span, product: Tensor, factor: Tensor, gradient: Tensor, weight: Tensor) -> Piece:
        features = self.groups[span.group].features
        columns = [features[..., samples, span.start : span.stop] for samples in self.batches.samples]

        def by_set(lines: Tensor) -> Tensor:
            return lines if features.ndim == 2 else lines.unflatten(0, (len(features), -1))

        return Piece(
            span,
            columns,
            [each.transpose(-1, -2) for each in columns],
            [by_set(error[span.lines]) for error in self.rough_error],
            [by_set(logits[span.lines]) for logits in self.logits],
            by_set(product),
            by_set(factor),
            gradient,
            weight,
        )

    def train(self) -> list[HeadStack]:
        """Take all steps; the heads of each group, in the memory of the moments."""
        for step in range(self.steps):
            self.step(step)
        losses, bias = self.losses(), (self.bias[:, None] * self.rate).view(-1, self.n_classes)
        counts = [len(group.specs) for group in self.groups]
        parts = zip(self.weight(self.moments), bias.split(counts), losses.split(counts), strict=True)
        return [HeadStack(*part) for part in parts]

    def step(self, step: int) -> None:
        """One mini-batch; expects its logits and leaves those of the next."""
        batch, following = (number % len(self.batches.samples) for number in (step, step + 1))
        share = self.logits[batch].shape[1] / self.batches.size
        self._compute_error(batch)
        self.count.fill_(step + 1)
        torch.sum(self.error[batch], 1, out=self.bias_gradient)
        self._update([self.bias, self.bias_moments, self.bias_squares], self.bias_gradient, step)
        self.logits[following].copy_(self.bias[:, None].expand_as(self.logits[following]))
        for block in self.blocks:
            self._load(block)
            self._compute_gradient(block, batch)
            for piece in block.pieces:
                self._penalize(piece, share)
            self._update(block.state, block.gradient, step)
            self._add_logits(block, following)
            self._save(block)

    def _update(self, state: list[Tensor], gradient: Tensor, step: int) -> None:
        """Adam with a cosine decay to zero, in one pass (the kernel of ``torch.optim.Adam(fused=True)``).

        Epsilon is not corrected for the bias of the moments here, as it is in that kernel.
        """
        weight, moment, square = state
        torch._fused_adam_(
            [weight], [gradient], [moment], [square], [], [self.count],
            lr=0.5 * (1 + math.cos(math.pi * step / self.steps)), beta1=BETA1, beta2=BETA2,
            eps=EPSILON / math.sqrt(1 - BETA2 ** (step + 1)), weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip

    def losses(self) -> Tensor:
        """Mean cross-entropy of each head over all rows, float32 [n_heads], in nats."""
        total = self._zeros(self.n_heads)
        for batch, samples in enumerate(self.batches.samples):
            values = self._forward(batch).mul_(self.rate).view(self.n_heads, self.n_classes, -1)
            targets = self.batches.targets[samples].expand(self.n_heads, -1)
            total += torch.nn.functional.cross_entropy(values, targets, reduction="none").sum(1)
        return total / self.batches.n_samples

    def weight(self, into: Tensor | None = None) -> list[Tensor]:
        """The weights of each group, float32 [n_heads, n_features, n_classes]."""
        flat = torch.empty_like(self.weights) if into is None else into
        shapes = [(len(group.specs) * self.n_classes, group.n_features) for group in self.groups]
        parts = flat.split([math.prod(shape) for shape in shapes])
        found = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        for block in self.blocks:
            spans = [piece.span for piece in block.pieces]
            for span, weight in zip(spans, lines_of(block.stored[0], spans), strict=True):
                rate = self.rate[span.lines].to(flat.device)
                torch.mul(weight, rate, out=found[span.group][:, span.start : span.stop])
        return [lines.unflatten(0, (-1, self.n_classes)).transpose(1, 2) for lines in found]

    def _load(self, block: Block) -> None:
        if self.offload:
            for here, there in zip(block.state, block.stored, strict=True):
                here.copy_(there, non_blocking=True)

    def _save(self, block: Block) -> None:
        if self.offload:
            for here, there in zip(block.state, block.stored, strict=True):
                there.copy_(here)

    def _forward(self, batch: int) -> Tensor:
        """Logits of a batch, divided by the heads' rates, float32 [n_lines, length]."""
        logits = self.logits[batch].copy_(self.bias[:, None].expand_as(self.logits[batch]))
        for block in self.blocks:
            self._load(block)
            self._add_logits(block, batch)
        return logits

    def _compute_error(self, batch: int) -> None:
        """Gradient of the loss by the logits, [n_lines, length]: (softmax - one-hot) / batch size."""
        shape = (self.n_heads, self.n_classes, -1)
        logits, error = self.logits[batch].mul_(self.rate).view(shape), self.error[batch].view(shape)
        torch.softmax(logits, 1, out=error)
        torch.add(self.batches.misses[batch], error, alpha=1 / self.batches.size, out=error)
        if self.rough is not None:
            self.rough_error[batch].copy_(self.error[batch])

    def _compute_gradient(self, block: Block, batch: int) -> None:
        """Gradient of the mean cross-entropy by the weights of a block."""
        for piece in block.pieces:
            _product(piece)(piece.error[batch], piece.columns[batch], out=piece.product)
        if self.rough is not None:
            block.gradient.copy_(block.product)

    def _add_logits(self, block: Block, batch: int) -> None:
        if self.rough is not None:
            block.factor.copy_(block.state[0])
        for piece in block.pieces:
            logits, columns = piece.logits[batch], piece.transposed[batch]
            if self.rough is not None:
                logits.add_(_product(piece)(piece.factor, columns))
            elif logits.ndim == 2:
                logits.addmm_(piece.factor, columns)
            else:
                logits.baddbmm_(piece.factor, columns)

    def _penalize(self, piece: Piece, share: float) -> None:
        """Add the regularizers' gradients; the scale of the weights matters for ``l2`` alone."""
        for regularizer, (lines, coefficient) in self.penalties[piece.span.group].items():
            ours, values = piece.gradient[lines], piece.weight[lines]
            spare = self.spare[: values.numel()].view(values.shape)
            if regularizer == "l2":
                ours.addcmul_(values, coefficient, value=share)
            elif regularizer == "l1":
                ours.addcmul_(torch.sign(values, out=spare), coefficient, value=share)
            else:
                heads = (-1, self.n_classes, values.shape[1])
                norms = self.norms[: values.numel() // self.n_classes].view(-1, values.shape[1])
                torch.sum(torch.mul(values, values, out=spare).view(heads), 1, out=norms)
                norms.clamp_(min=1e-30).rsqrt_().mul_(coefficient)  # a row of zeros has the gradient zero
                ours.view(heads).addcmul_(values.view(heads), norms[:, None], value=share)


def _product(piece: Piece) -> Callable[..., Tensor]:
    """``torch.matmul`` makes the same choice, in more time than a small product takes."""
    return torch.mm if piece.product.ndim == 2 else torch.bmm


def _penalties(
    specs: Sequence[HeadSpec], n_classes: int, device: torch.device
) -> dict[str, tuple[slice, Tensor]]:
    """The lines of each regularizer's heads and their coefficients, a column (``l21``: one per head)."""
    found = {}
    for name in get_args(Regularizer):
        heads = [head for head, spec in enumerate(specs) if spec.regularizer == name]
        if any(specs[head].coefficient for head in heads):
            assert heads[-1] - heads[0] < len(heads), "specs are ordered by regularizer"
            scale = [2 * specs[head].learning_rate if name == "l2" else 1.0 for head in heads]
            values = [specs[head].coefficient * s for head, s in zip(heads, scale, strict=True)]
            column = torch.tensor(values, device=device)[:, None]
            lines = slice(heads[0] * n_classes, (heads[-1] + 1) * n_classes)
            found[name] = (lines, column if name == "l21" else column.repeat_interleave(n_classes, 0))
    return found
