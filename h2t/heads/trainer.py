"""Groups of linear heads that are trained together, mini-batch by mini-batch.

The weights of all heads lie in blocks of features, ``[n_heads * n_classes, width]`` each, so that the
gradient, the regularizer, Adam's update and the next batch's share of the logits of a block are computed
while it is in the cache: a step reads every weight from memory once, and a whole gradient never exists.
Small heads on features of their own share a block, so that one call updates many of them.

A head comes out the same to the last bit whichever heads are trained beside it (in float32 on a CPU with one
thread): blocks are cut alike for any number of heads, and no kernel used here rounds a head by its place.
The one exception is the matrix product of the library that torch is built with: with fewer than
:data:`FEWEST_ROWS` rows it takes another way. Several threads may cut the product elsewhere and round
otherwise, by a few units in the last place in a step, and so may other processors and GPUs.

Heads of different learning rates share one fused update because the weights are stored divided by the rate.
Adam is w <- w - lr * a(g), and its direction a(g) depends on the gradient with respect to w alone. With
v = w / lr this is v <- v - a(g), the same step for every head. Only two places see lr again: logits are
lr * (x @ v + b / lr), and the gradient of the l2 penalty is 2 c w = 2 c lr v. The other penalties divide by a
norm or take the sign, which are those of v.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from h2t.heads.blocks import (
    Block,
    HeadGroup,
    HeadStack,
    Span,
    SpanViews,
    aligned,
    cut_spans,
    split_spans,
)
from h2t.heads.regularizers import Penalties

FEWEST_ROWS = 4
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-7
BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}  # of weights: on a CPU a block and its moments stay in the cache


class Batches:
    """Labels cut into mini-batches of ``size``, used over and over in this order.

    ``targets`` int64 [n_samples], or [n_heads, n_samples] for heads whose features come in orders of their
    own.
    """

    def __init__(self, targets: Tensor, n_classes: int, size: int) -> None:
        self.targets, self.n_classes, self.size, self.n_samples = targets, n_classes, size, targets.shape[-1]
        starts = range(0, self.n_samples, size)
        self.samples = [slice(start, min(start + size, self.n_samples)) for start in starts]
        # Of a batch in memory, where every row of logits begins at whole 16 bytes.
        self.lengths = [aligned(batch.stop - batch.start) for batch in self.samples]
        neg_targets = torch.nn.functional.one_hot(targets, n_classes).float().mT / -size
        self.neg_targets = [
            torch.nn.functional.pad(neg_targets[..., batch], (0, length - (batch.stop - batch.start)))
            for batch, length in zip(self.samples, self.lengths, strict=True)
        ]

    def n_samples_of(self, batch: int) -> int:
        """The number of samples in a batch."""
        return self.samples[batch].stop - self.samples[batch].start


class HeadTrainer:
    """Groups of heads that all take the same number of steps, with their optimizer state.

    One-shot: :meth:`train` writes the trained weights over the optimizer's moments. ``offload`` keeps all but
    a block of the state away from the device.
    """

    def __init__(self, batches: Batches, groups: Sequence[HeadGroup], *, offload: bool = False) -> None:
        self.batches, self.groups, self.device = batches, groups, batches.targets.device
        specs = [spec for group in groups for spec in group.specs]
        self.steps, self.n_classes, self.n_heads = specs[0].steps, batches.n_classes, len(specs)
        self.dtype, self.offload = groups[0].features.dtype, offload
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by batch
        self._graph_memory = None if self.device.type == "cpu" else torch.cuda.graph_pool_handle()
        rates = torch.tensor([spec.learning_rate for spec in specs], device=self.device)
        self.rate = rates.repeat_interleave(self.n_classes)[:, None]
        spans = list(cut_spans(groups, self.n_classes, BLOCK_BYTES[self.device.type] // 4))
        sizes = [_whole_vectors(sum(span.size for span in block)) for block in spans]
        self.scaled_weights = self._state(sum(sizes))
        self._start(spans, sizes)
        # Only now, so that memory peaks only once.
        self.moments, self.squares = self._state(sum(sizes)), self._state(sum(sizes))
        self._make_buffers(max(sizes))
        self.penalties = [Penalties(group, self.n_classes, self.spare, self.norms) for group in groups]
        self.blocks = list(self._blocks(spans, sizes))
        self._forward(0)
        self.tap_penalties = [penalties for penalties in self.penalties if penalties.by_tap]
        for block in self.blocks if self.tap_penalties else []:
            self._load(block)
            self._measure_taps(block)

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
        self.bias_state = [self._zeros(_whole_vectors(self.n_heads * self.n_classes)) for _ in range(3)]
        self.bias = self.bias_state[0][: self.n_heads * self.n_classes]
        weights: list[tuple[Span, Tensor]] = []
        for block, flat in zip(spans, self.scaled_weights.split(sizes), strict=True):
            weights += zip(block, split_spans(flat, block), strict=True)
        for number, group in enumerate(self.groups):
            group_weights = [pair for pair in weights if pair[0].group == number]
            for head, spec in enumerate(group.specs):
                first = group.first_weight(head, self.n_classes)
                class_rows = slice(head * self.n_classes, (head + 1) * self.n_classes)
                for span, weight in group_weights:
                    weight[class_rows].copy_(first[span.start : span.stop].T).div_(spec.learning_rate)
            if group.bias is not None:
                class_rows = group_weights[0][0].class_rows
                self.bias[class_rows].copy_(group.bias.reshape(-1)).div_(self.rate[class_rows, 0])

    def _make_buffers(self, largest: int) -> None:
        n_class_rows = self.n_heads * self.n_classes
        lengths = self.batches.lengths
        self.count = self._zeros()
        # In the precision in which the kernel of the device reads it.
        self.step_rate = self._zeros(dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
        self.epsilon = EPSILON
        self.bias_gradient = self._zeros(_whole_vectors(n_class_rows))
        self.gradient, self.spare = self._zeros(largest), self._zeros(largest)
        self.norms = self._zeros(largest // self.n_classes)
        self.staged = [self._zeros(largest) for _ in range(3)] if self.offload else []
        # The operands and results of the products, where these are not float32.
        self.low_precision = self._zeros(largest, dtype=self.dtype) if self.dtype != torch.float32 else None
        float32 = self._zeros(2, n_class_rows * max(lengths))
        error_lp = float32[1]
        if self.low_precision is not None:
            error_lp = self._zeros(n_class_rows * max(lengths), dtype=self.dtype)
        # A contiguous [n_class_rows, length] for each batch, all in the same memory.
        self.logits, self.error, self.error_lp = (
            [buffer[: n_class_rows * length].view(n_class_rows, length) for length in lengths]
            for buffer in (*float32, error_lp)
        )

    def _blocks(self, spans: list[list[Span]], sizes: list[int]) -> Iterator[Block]:
        states = (self.scaled_weights, self.moments, self.squares)
        for block, *stored in zip(spans, *(state.split(sizes) for state in states), strict=True):
            size = len(stored[0])
            state = [buffer[:size] for buffer in self.staged] or stored
            gradient = self.gradient[:size]
            grad_lp = gradient if self.low_precision is None else self.low_precision[:size]
            weight_lp = state[0] if self.low_precision is None else self.low_precision[:size]
            tensors = [split_spans(flat, block) for flat in (grad_lp, weight_lp, gradient, state[0])]
            views = [self._views(span, *parts) for span, *parts in zip(block, *tensors, strict=True)]
            yield Block(stored, state, gradient, grad_lp, weight_lp, views)

    def _views(
        self, span: Span, grad_lp: Tensor, weight_lp: Tensor, gradient: Tensor, weight: Tensor
    ) -> SpanViews:
        features = self.groups[span.group].features
        columns = [features[..., samples, span.start : span.stop] for samples in self.batches.samples]

        batches = range(len(columns))

        def by_matrix(class_rows: Tensor) -> Tensor:
            return class_rows if features.ndim == 2 else class_rows.unflatten(0, (len(features), -1))

        return SpanViews(
            span,
            columns,
            [batch.transpose(-1, -2) for batch in columns],
            [by_matrix(self._of_samples(self.error_lp, batch)[span.class_rows]) for batch in batches],
            [by_matrix(self._of_samples(self.logits, batch)[span.class_rows]) for batch in batches],
            by_matrix(grad_lp),
            by_matrix(weight_lp),
            gradient,
            weight,
        )

    def _of_samples(self, rows: list[Tensor], batch: int) -> Tensor:
        """The columns of a batch's samples, [n_class_rows, b], of logits or errors."""
        return rows[batch][:, : self.batches.n_samples_of(batch)]

    def train(self) -> list[HeadStack]:
        """Take all steps and return the heads of each group, in the memory of the moments."""
        for step in range(self.steps):
            self.step(step)
        losses, bias = self.losses(), (self.bias[:, None] * self.rate).view(-1, self.n_classes)
        counts = [len(group.specs) for group in self.groups]
        parts = zip(self.weight(out=self.moments), bias.split(counts), losses.split(counts), strict=True)
        return [HeadStack(*part) for part in parts]

    def step(self, step: int) -> None:
        """Train on one mini-batch; expects its logits and leaves those of the next.

        On a GPU small heads take less time than the launches of their kernels. So after a warm-up the
        launches of each batch are recorded once, and a step replays them.
        """
        batch = step % len(self.batches.samples)
        self._set_rate(step)
        if self.device.type == "cpu" or self.offload or step < len(self.batches.samples):
            self._train_on(batch)
            return
        if batch not in self._graphs:
            self._graphs[batch] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[batch], pool=self._graph_memory):
                self._train_on(batch)
        self._graphs[batch].replay()

    def _set_rate(self, step: int) -> None:
        """Set what differs from step to step: Adam with cosine decay to zero.

        Keras, which the official code uses, subtracts, with b1, b2 for beta^t,
        lr * sqrt(1 - b2) / (1 - b1) * m / (sqrt(s) + eps); this kernel, ``torch.optim.Adam(fused=True)``'s,
        lr / (1 - b1) * m / (sqrt(s / (1 - b2)) + eps). Dividing eps by sqrt(1 - b2) makes the two equal. A
        recorded launch keeps its eps: so on a GPU the kernel's b1 and b2 are 0, and lr has all of Keras's.
        """
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        root = math.sqrt(1 - BETA2 ** (step + 1))
        if self.device.type == "cpu":
            self.count.fill_(step + 1)
            self.step_rate.fill_(decay)
            self.epsilon = EPSILON / root
        else:
            self.count.fill_(1e6)
            self.step_rate.fill_(decay * root / (1 - BETA1 ** (step + 1)))

    def _train_on(self, batch: int) -> None:
        following = (batch + 1) % len(self.batches.samples)
        batch_fraction = self.batches.n_samples_of(batch) / self.batches.size
        self._compute_error(batch)
        torch.sum(self._of_samples(self.error, batch), 1, out=self.bias_gradient[: len(self.bias)])
        self._update(self.bias_state, self.bias_gradient)
        self.logits[following].copy_(self.bias[:, None].expand_as(self.logits[following]))
        for penalties in self.tap_penalties:
            penalties.begin_step()
        for block in self.blocks:
            self._load(block)
            self._compute_gradient(block, batch)
            for views in block.views:
                self.penalties[views.span.group].add_gradients(views, batch_fraction)
            self._update(block.state, block.gradient)
            if self.tap_penalties:
                self._measure_taps(block)
            self._add_logits(block, following)
            self._save(block)

    def _update(self, state: list[Tensor], gradient: Tensor) -> None:
        """Take one Adam step, in one pass over the state."""
        weight, moment, square = state
        torch._fused_adam_(
            [weight], [gradient], [moment], [square], [], [self.count],
            lr=self.step_rate, beta1=BETA1, beta2=BETA2, eps=self.epsilon, weight_decay=0.0, amsgrad=False,
            maximize=False,
        )  # fmt: skip

    def losses(self) -> Tensor:
        """Mean cross-entropy of each head over all rows, float32 [n_heads], in nats."""
        total = self._zeros(self.n_heads)
        for batch, samples in enumerate(self.batches.samples):
            values = self._forward(batch).mul_(self.rate).view(self.n_heads, self.n_classes, -1)
            values = values[..., : self.batches.n_samples_of(batch)]
            targets = self.batches.targets[..., samples].expand(self.n_heads, -1)
            total += torch.nn.functional.cross_entropy(values, targets, reduction="none").sum(1)
        return total / self.batches.n_samples

    def weight(self, out: Tensor | None = None) -> list[Tensor]:
        """The weights of each group, float32 [n_heads, n_features, n_classes]; ``out`` is their memory."""
        flat = torch.empty_like(self.scaled_weights) if out is None else out
        shapes = [(len(group.specs) * self.n_classes, group.n_features) for group in self.groups]
        sizes = [math.prod(shape) for shape in shapes]
        parts = flat[: sum(sizes)].split(sizes)
        weights = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        for block in self.blocks:
            spans = [views.span for views in block.views]
            for span, scaled in zip(spans, split_spans(block.stored[0], spans), strict=True):
                rate = self.rate[span.class_rows].to(flat.device)
                torch.mul(scaled, rate, out=weights[span.group][:, span.start : span.stop])
        return [weight.unflatten(0, (-1, self.n_classes)).transpose(1, 2) for weight in weights]

    def _load(self, block: Block) -> None:
        if self.offload:
            for here, there in zip(block.state, block.stored, strict=True):
                here.copy_(there, non_blocking=True)

    def _save(self, block: Block) -> None:
        if self.offload:
            for here, there in zip(block.state, block.stored, strict=True):
                there.copy_(here)

    def _forward(self, batch: int) -> Tensor:
        """Logits of a batch, divided by the heads' rates, float32 [n_class_rows, length]."""
        logits = self.logits[batch].copy_(self.bias[:, None].expand_as(self.logits[batch]))
        for block in self.blocks:
            self._load(block)
            self._add_logits(block, batch)
        return logits

    def _compute_error(self, batch: int) -> None:
        """Gradient of the loss by the logits, [n_class_rows, length]: (softmax - one-hot) / batch size.

        What lies beside the samples is computed too, and used by nobody.
        """
        shape = (self.n_heads, self.n_classes, -1)
        logits, error = self.logits[batch].mul_(self.rate).view(shape), self.error[batch].view(shape)
        torch.softmax(logits, 1, out=error)
        torch.add(self.batches.neg_targets[batch], error, alpha=1 / self.batches.size, out=error)
        if self.low_precision is not None:
            self.error_lp[batch].copy_(self.error[batch])

    def _compute_gradient(self, block: Block, batch: int) -> None:
        """Gradient of the mean cross-entropy by the weights of a block."""
        for views in block.views:
            _matmul(views)(views.error[batch], views.columns[batch], out=views.grad_lp)
        if self.low_precision is not None:
            block.gradient.copy_(block.grad_lp)

    def _measure_taps(self, block: Block) -> None:
        for views in block.views:
            if self.penalties[views.span.group].by_tap:
                self.penalties[views.span.group].measure_taps(views)

    def _add_logits(self, block: Block, batch: int) -> None:
        if self.low_precision is not None:
            block.weight_lp.copy_(block.state[0])
        for views in block.views:
            logits, columns = views.logits[batch], views.transposed[batch]
            if self.low_precision is not None:
                logits.add_(_matmul(views)(views.weight_lp, columns))
            elif logits.ndim == 2:
                logits.addmm_(views.weight_lp, columns)
            else:
                logits.baddbmm_(views.weight_lp, columns)


def _whole_vectors(size: int) -> int:
    """``size`` rounded up so that Adam's kernel has no remainder, which it rounds otherwise than the rest."""
    return -(-size // 64) * 64


def _matmul(views: SpanViews) -> Callable[..., Tensor]:
    """``torch.matmul`` makes the same choice, in more time than a small product takes."""
    return torch.mm if views.grad_lp.ndim == 2 else torch.bmm
