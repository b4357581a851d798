"""One stack of linear heads that are trained together, mini-batch by mini-batch.

The weights of all heads lie in blocks of features, ``[n_heads * n_classes, block]`` each, so that the
gradient, the regularizer, Adam's update and the next batch's share of the logits of a block are computed
while it is in the cache: a step reads every weight from memory once, and a whole gradient never exists.

Weights are kept divided by their head's learning rate. The size of Adam's step does not depend on the scale
of the weights, so heads of different rates then take the same step and are updated together.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Regularizer = Literal["l1", "l2", "l21"]
Precision = Literal["float32", "bfloat16"]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-7
BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}  # of weights: on a CPU a block and its moments stay in the cache


@dataclass(frozen=True)
class HeadSpec:
    """How one head is trained: by Adam with a cosine decay to zero, with a regularizer on its weights.

    ``steps`` counts mini-batches. ``coefficient`` weighs the sum of absolute weights (``l1``), of squared
    weights (``l2``) or of the norms of the features' rows (``l21``, Section 3.2). ``seed`` draws the first
    weights.
    """

    learning_rate: float
    steps: int
    regularizer: Regularizer | None = None
    coefficient: float = 0.0
    seed: int = 0


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


class Batches:
    """Mini-batches of features and labels, read a block of columns at a time.

    ``rows`` float32 [n_samples, n_features] or [n_sets, n_samples, n_features], ``targets`` int64
    [n_samples].
    """

    def __init__(
        self,
        rows: Tensor,
        targets: Tensor,
        n_classes: int,
        size: int,
        widths: Sequence[int] | None,
        dtype: Precision,
    ) -> None:
        self.rows = rows if rows.ndim == 3 else rows[None]
        self.targets, self.n_classes, self.size = targets, n_classes, size
        self.n_sets, self.n_samples, self.n_features = self.rows.shape
        self.dtype = getattr(torch, dtype)
        self.spans = list(pairwise(np.cumsum([0, *widths]).tolist())) if widths is not None else []
        self.scales = [_inverse_norms(self.rows[:, :, low:high]) for low, high in self.spans]
        starts = range(0, self.n_samples, size)
        self.samples = [slice(start, min(start + size, self.n_samples)) for start in starts]
        hits = torch.nn.functional.one_hot(targets, n_classes).float() / size
        self.hits = [hits[batch].T.contiguous() for batch in self.samples]
        self.buffer = rows.new_empty(0)

    def read(self, samples: slice, start: int, stop: int) -> Tensor:
        """Columns start..stop of a batch, [n_sets, length, stop - start]; valid until the next call."""
        block = self.rows[:, samples, start:stop]
        if self.scales:
            if self.buffer.numel() < block.numel():
                self.buffer = torch.empty(block.numel(), device=block.device)
            scaled = self.buffer[: block.numel()].view(block.shape)
            for (low, high), scale in zip(self.spans, self.scales, strict=True):
                low, high = max(low, start), min(high, stop)
                if low < high:
                    own = scaled[:, :, low - start : high - start]
                    torch.mul(self.rows[:, samples, low:high], scale[:, samples], out=own)
            block = scaled
        return block.to(self.dtype)


def _inverse_norms(values: Tensor) -> Tensor:
    """One over the norm of each example, float32 [n_sets, n_samples, 1]; 0 for an example of zeros."""
    norms = torch.linalg.vector_norm(values, dim=2, keepdim=True)
    return torch.where(norms > 0, 1 / norms, 0)


class HeadTrainer:
    """Heads of the same number of steps, ordered by regularizer, with their optimizer state.

    ``weight`` [n_heads, n_features, n_classes] and ``bias`` [n_heads, n_classes] are where to start. With one
    feature matrix all heads share the products; with one per head (n_sets) products are batched. A *line* is
    one class of one head: weights are [n_heads * n_classes, block], in blocks of features. ``offload`` keeps
    all but a block of the state away from the device.
    """

    def __init__(
        self,
        batches: Batches,
        specs: Sequence[HeadSpec],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        offload: bool = False,
    ) -> None:
        self.batches, self.specs, self.device = batches, specs, batches.rows.device
        self.steps, self.n_classes = specs[0].steps, batches.n_classes
        self.lines = len(specs) * self.n_classes
        width = BLOCK_BYTES[self.device.type] // 4 // self.lines // 64 * 64
        self.width = min(max(width, 128), batches.n_features)
        self.spans = list(pairwise([*range(0, batches.n_features, self.width), batches.n_features]))
        self.offload = offload
        self.weights = self._state()
        self.bias = self._zeros(self.lines)
        rates = torch.tensor([spec.learning_rate for spec in specs], device=self.device)
        self.rate = rates.repeat_interleave(self.n_classes)[:, None]
        self.penalties = _penalties(specs, self.n_classes, self.device)
        self._start(weight, bias)
        self._prepare()
        self._forward(batches.samples[0])

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, device=self.device)

    def _state(self) -> Tensor:
        """Zeros for every weight; away from the device if that has no room for them."""
        size = self.lines * self.batches.n_features
        if not self.offload:
            return self._zeros(size)
        if self.device.type != "cpu":
            return torch.zeros(size, pin_memory=True)
        with tempfile.NamedTemporaryFile(prefix="h2t-") as file:
            # The file loses its name at once, and its space when it is no longer mapped.
            return torch.from_file(file.name, shared=True, size=size)

    def _block(self, state: Tensor, index: int) -> Tensor:
        start, stop = self.spans[index]
        return state[self.lines * start : self.lines * stop].view(self.lines, stop - start)

    def _start(self, weight: Tensor | None, bias: Tensor | None) -> None:
        """Set the first weights, [n_heads, n_features, n_classes], and biases, [n_heads, n_classes]."""
        for head, spec in enumerate(self.specs):
            shape = self.batches.n_features, self.n_classes
            first = torch.from_numpy(initial_weights(spec.seed, *shape)) if weight is None else weight[head]
            for index, (start, stop) in enumerate(self.spans):
                own = self._block(self.weights, index)[head * self.n_classes : (head + 1) * self.n_classes]
                own.copy_(first[start:stop].T).div_(spec.learning_rate)
        if bias is not None:
            self.bias.copy_(bias.reshape(-1)).div_(self.rate[:, 0])

    def _prepare(self) -> None:
        """Moments and buffers, made once: after the first weights, so that memory peaks only once."""
        self.moments, self.squares = self._state(), self._state()
        self.count = torch.zeros((), device=self.device)
        self.bias_moments, self.bias_squares = self._zeros(self.lines), self._zeros(self.lines)
        self.gradient, self.spare = self._zeros(self.lines * self.width), self._zeros(self.lines * self.width)
        self.norms = self._zeros(len(self.specs) * self.width)
        self.logits, self.error = (self._zeros(self.lines * self.batches.size) for _ in range(2))
        self.staged = [self._zeros(self.lines * self.width) for _ in range(3)] if self.offload else []

    def train(self) -> HeadStack:
        """Take all steps; the result lies in the memory of the moments."""
        for step in range(self.steps):
            self.step(step)
        losses = self.losses()
        weight = self.weight(into=self.moments)
        return HeadStack(weight, (self.bias[:, None] * self.rate).view(-1, self.n_classes), losses)

    def step(self, step: int) -> None:
        """One mini-batch; expects its logits and leaves those of the next."""
        samples = self.batches.samples
        batch, following = step % len(samples), samples[(step + 1) % len(samples)]
        error = self._error(batch)
        share = error.shape[1] / self.batches.size
        self.count.fill_(step + 1)
        self._update(self.bias, error.sum(1), self.bias_moments, self.bias_squares, step)
        error, logits = error.to(self.batches.dtype), self._logits_of(following).zero_()
        for index, (start, stop) in enumerate(self.spans):
            weight, moment, square = self._load(index)
            gradient = self.gradient[: weight.numel()].view(weight.shape)
            self._multiply(error, self.batches.read(samples[batch], start, stop), gradient)
            self._penalize(gradient, weight, share)
            self._update(weight, gradient, moment, square, step)
            self._add_logits(logits, weight, self.batches.read(following, start, stop))
            self._save(index)

    def _update(self, weight: Tensor, gradient: Tensor, moment: Tensor, square: Tensor, step: int) -> None:
        """Adam with a cosine decay to zero, in one pass (the kernel of ``torch.optim.Adam(fused=True)``).

        Epsilon is not corrected for the bias of the moments here, as it is in that kernel.
        """
        torch._fused_adam_(
            [weight], [gradient], [moment], [square], [], [self.count],
            lr=0.5 * (1 + math.cos(math.pi * step / self.steps)), beta1=BETA1, beta2=BETA2,
            eps=EPSILON / math.sqrt(1 - BETA2 ** (step + 1)), weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip

    def losses(self) -> Tensor:
        """Mean cross-entropy of each head over all rows, float32 [n_heads], in nats."""
        total = self._zeros(len(self.specs))
        for samples in self.batches.samples:
            values = self._forward(samples).add_(self.bias[:, None]).mul_(self.rate)
            values = values.view(len(self.specs), self.n_classes, -1)
            targets = self.batches.targets[samples].expand(len(self.specs), -1)
            total += torch.nn.functional.cross_entropy(values, targets, reduction="none").sum(1)
        return total / self.batches.n_samples

    def weight(self, into: Tensor | None = None) -> Tensor:
        """The weights, float32 [n_heads, n_features, n_classes]."""
        flat = torch.empty_like(self.weights) if into is None else into
        out = flat.view(self.lines, -1)
        for index, (start, stop) in enumerate(self.spans):
            torch.mul(self._block(self.weights, index), self.rate.to(flat.device), out=out[:, start:stop])
        return out.view(len(self.specs), self.n_classes, -1).transpose(1, 2)

    def _load(self, index: int) -> list[Tensor]:
        """Weights, moments and squares of a block, on the device."""
        blocks = [self._block(state, index) for state in (self.weights, self.moments, self.squares)]
        if not self.offload:
            return blocks
        staged = [
            buffer[: block.numel()].view(block.shape)
            for buffer, block in zip(self.staged, blocks, strict=True)
        ]
        return [buffer.copy_(block, non_blocking=True) for buffer, block in zip(staged, blocks, strict=True)]

    def _save(self, index: int) -> None:
        for state, buffer in zip((self.weights, self.moments, self.squares), self.staged, strict=False):
            block = self._block(state, index)
            block.copy_(buffer[: block.numel()].view(block.shape))

    def _logits_of(self, samples: slice) -> Tensor:
        length = samples.stop - samples.start
        return self.logits[: self.lines * length].view(self.lines, length)

    def _forward(self, samples: slice) -> Tensor:
        logits = self._logits_of(samples).zero_()
        for index, (start, stop) in enumerate(self.spans):
            self._add_logits(logits, self._load(index)[0], self.batches.read(samples, start, stop))
        return logits

    def _error(self, batch: int) -> Tensor:
        """Gradient of the loss by the logits, float32 [lines, length]: (softmax - one-hot) / batch size."""
        logits = self._logits_of(self.batches.samples[batch]).add_(self.bias[:, None]).mul_(self.rate)
        error = self.error[: logits.numel()].view(len(self.specs), self.n_classes, -1)
        torch.softmax(logits.view(error.shape), 1, out=error)
        return error.mul_(1 / self.batches.size).sub_(self.batches.hits[batch]).view(logits.shape)

    def _by_set(self, lines: Tensor) -> Tensor:
        return lines.view(self.batches.n_sets, -1, lines.shape[1])

    def _multiply(self, error: Tensor, block: Tensor, out: Tensor) -> None:
        if error.dtype == out.dtype:
            torch.bmm(self._by_set(error), block, out=self._by_set(out))
        else:
            self._by_set(out).copy_(torch.bmm(self._by_set(error), block))

    def _add_logits(self, logits: Tensor, weight: Tensor, block: Tensor) -> None:
        if block.dtype == weight.dtype:
            self._by_set(logits).baddbmm_(self._by_set(weight), block.transpose(1, 2))
        else:
            self._by_set(logits).add_(torch.bmm(self._by_set(weight.to(block.dtype)), block.transpose(1, 2)))

    def _penalize(self, gradient: Tensor, weight: Tensor, share: float) -> None:
        """Add the regularizers' gradients; the scale of the weights matters for ``l2`` alone."""
        for regularizer, (lines, coefficient) in self.penalties.items():
            ours, values = gradient[lines], weight[lines]
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


def _penalties(
    specs: Sequence[HeadSpec], n_classes: int, device: torch.device
) -> dict[str, tuple[slice, Tensor]]:
    """The lines of each regularizer's heads and their coefficients, a column (``l21``: one per head)."""
    found = {}
    for name in get_args(Regularizer):
        heads = [head for head, spec in enumerate(specs) if spec.regularizer == name]
        if any(specs[head].coefficient for head in heads):
            scale = [2 * specs[head].learning_rate if name == "l2" else 1.0 for head in heads]
            values = [specs[head].coefficient * s for head, s in zip(heads, scale, strict=True)]
            column = torch.tensor(values, device=device)[:, None]
            lines = slice(heads[0] * n_classes, (heads[-1] + 1) * n_classes)
            found[name] = (lines, column if name == "l21" else column.repeat_interleave(n_classes, 0))
    return found
