"""Trains many linear heads at once, of any mix of rates, steps, regularizers and seeds."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Required, TypedDict, Unpack, get_args

import numpy as np
import torch
from torch import Tensor

from h2t.device import tf32
from h2t.errors import UserError, unknown
from h2t.features import FeatureLayout
from h2t.heads.blocks import HeadGroup, HeadStack
from h2t.heads.spec import HeadSpec, Precision, Regularizer
from h2t.heads.trainer import FEWEST_ROWS, Batches, HeadTrainer

__all__ = ["HeadSpec", "HeadStack", "checked", "train_groups", "train_heads", "train_stacks"]

Array = Tensor | np.ndarray


class TrainOptions(TypedDict, total=False):
    """The options of :func:`train_stacks`."""

    n_classes: Required[int]
    layout: FeatureLayout | None
    batch_size: int
    device: str | torch.device | None
    precision: Precision
    memory_budget: int | None


def train_heads(
    features: Array, labels: Array, specs: Sequence[HeadSpec], **options: Unpack[TrainOptions]
) -> HeadStack:
    """Train one linear head per spec, as :func:`train_stacks`, and return them in the order of the specs."""
    return _in_order(list(train_stacks(features, labels, specs, **options)))


def train_stacks(
    features: Array,
    labels: Array,
    specs: Sequence[HeadSpec],
    *,
    n_classes: int,
    layout: FeatureLayout | None = None,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    precision: Precision = "float32",
    memory_budget: int | None = None,
) -> Iterator[tuple[list[int], HeadStack]]:
    """Train one linear head per spec; rates, steps, regularizers and seeds mix freely.

    ``features`` float32 [n_samples, n_features], shared by all heads, or [n_heads, n_samples, n_features],
    one matrix per head; never written. ``labels`` integer [n_samples]. Rows are used in the order given, in
    batches of ``batch_size``, over and over; a shorter last batch counts in proportion to its length.
    ``layout`` says to which tap a column belongs, for the regularizer ``layergroup`` (default: all to one).
    Weights start Glorot-uniform by the spec's seed, biases at zero.

    ``precision`` is that of the matrix products ("tf32" rounds on a GPU alone); weights stay float32.
    ``memory_budget`` in bytes bounds the weights and moments on the device: heads take turns, and a head that
    is too large alone has them in a temporary file (beside an accelerator: in main memory), of which one
    block at a time is worked on.

    Yields (positions in ``specs``, their heads) as they are done. Raises UserError for specs, shapes, labels
    or features that cannot be used, before any work.
    """
    rows, targets = checked(features, labels, n_classes)
    _check_specs(specs, rows, layout)
    device = torch.device(device or "cpu")
    head_bytes = 3 * 4 * rows.shape[-1] * n_classes
    at_once = len(specs) if memory_budget is None else max(1, memory_budget // head_bytes)
    offload = memory_budget is not None and head_bytes > memory_budget
    batches = Batches(targets.to(device), n_classes, batch_size)
    rows = _for_products(rows, device, precision)
    for heads in _stacks(specs, at_once):
        inputs = rows if rows.ndim == 2 else rows[heads]
        members = [specs[head] for head in heads]
        if rows.ndim == 2:  # company for a head of few classes, for the product to take its usual way
            members += members[-1:] * max(0, -(-FEWEST_ROWS // n_classes) - len(members))
        # No name for the trainer: its weights and squares are given back before the next one starts.
        with tf32(precision == "tf32"):
            (stack,) = HeadTrainer(batches, [HeadGroup(inputs, members, layout)], offload=offload).train()
        n_heads = len(heads)
        yield heads, HeadStack(stack.weight[:n_heads], stack.bias[:n_heads], stack.train_loss[:n_heads])


def train_groups(
    groups: Sequence[tuple[Array, Array, Sequence[HeadSpec]]],
    *,
    n_classes: int,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    precision: Precision = "float32",
) -> list[HeadStack]:
    """Train groups of heads side by side, each as :func:`train_heads` would train it.

    Each group is (features, labels, specs): features [n_heads, n_samples, n_features] and labels
    [n_heads, n_samples], in an order of its own for each head, and specs ordered by regularizer; all groups
    have as many samples. Use it for many small heads: the time of such a head is kernel launches, which a
    joint step makes once.

    Raises UserError as :func:`train_heads` does, and for specs of different numbers of steps.
    """
    steps = sorted({spec.steps for *_, specs in groups for spec in specs})
    if len(steps) != 1:
        raise UserError(f"expected groups of equal steps, got {', '.join(map(str, steps)) or 'none'}")
    device = torch.device(device or "cpu")
    head_groups, targets = [], []
    for features, labels, specs in groups:
        rows, of_rows = checked(features, labels, n_classes)
        _check_specs(specs, rows)
        head_groups.append(HeadGroup(_for_products(rows, device, precision), specs))
        targets.append(of_rows.expand(len(specs), -1))
    batches = Batches(torch.cat(targets).to(device), n_classes, batch_size)
    with tf32(precision == "tf32"):
        return HeadTrainer(batches, head_groups).train()


def _for_products(rows: Tensor, device: torch.device, precision: Precision) -> Tensor:
    return rows.to(device, torch.bfloat16 if precision == "bfloat16" else torch.float32)


def checked(features: Array, labels: Array, n_classes: int) -> tuple[Tensor, Tensor]:
    """Features as float32 and labels as int64 tensors, without a copy where possible.

    Raises UserError for shapes that do not fit, an empty split, NaN or infinite features and labels out of
    range.
    """
    rows, targets = _tensor(features), _tensor(labels)
    if rows.ndim not in (2, 3) or targets.shape not in (rows.shape[-2:-1], rows.shape[:-1]):
        raise UserError(
            "expected features [n_samples, n_features] and labels [n_samples], got "
            f"{list(rows.shape)} and {list(targets.shape)}"
        )
    if not rows.numel():
        raise UserError(f"expected at least one row and one feature, got features {list(rows.shape)}")
    if targets.is_floating_point():
        raise UserError(f"expected integer labels, got {targets.dtype}")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= n_classes:
        raise UserError(f"expected labels in 0..{n_classes - 1} (n_classes={n_classes}), got {low}..{high}")
    for index in range(rows.shape[-2]):
        if not torch.isfinite(rows[..., index, :]).all():
            raise UserError(f"expected finite features, got NaN or infinity in row {index}")
    return rows.float(), targets.long()


def _tensor(values: Array) -> Tensor:
    if isinstance(values, Tensor):
        return values
    with warnings.catch_warnings():  # a read-only array stays as it is: nothing here writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(values))


def _check_specs(specs: Sequence[HeadSpec], rows: Tensor, layout: FeatureLayout | None = None) -> None:
    for spec in specs:
        if spec.regularizer is not None and spec.regularizer not in get_args(Regularizer):
            raise unknown("regularizer", spec.regularizer, get_args(Regularizer))
        if not (spec.learning_rate > 0 and spec.steps >= 1 and spec.coefficient >= 0):
            raise UserError(f"expected learning_rate > 0, steps >= 1 and coefficient >= 0, got {spec}")
    if not specs or (rows.ndim == 3 and len(rows) != len(specs)):
        raise UserError(
            f"expected one spec per feature matrix, got {len(specs)} for features {list(rows.shape)}"
        )
    if layout is not None and layout.n_features != rows.shape[-1]:
        raise UserError(f"expected the layout's {layout.n_features} features, got {rows.shape[-1]}")


def _stacks(specs: Sequence[HeadSpec], at_once: int) -> Iterator[list[int]]:
    """Positions of heads to train together: of the same number of steps, ordered by regularizer."""
    for steps in sorted({spec.steps for spec in specs}):
        heads = [head for head, spec in enumerate(specs) if spec.steps == steps]
        heads.sort(key=lambda head: specs[head].regularizer or "")
        yield from (heads[first : first + at_once] for first in range(0, len(heads), at_once))


def _in_order(stacks: list[tuple[list[int], HeadStack]]) -> HeadStack:
    """One stack of all heads, in the order of their specs."""
    order = [head for heads, _ in stacks for head in heads]
    if order == sorted(order) and len(stacks) == 1:
        return stacks[0][1]
    _, n_features, n_classes = stacks[0][1].weight.shape
    empty = stacks[0][1].bias.new_empty
    # Which may lie elsewhere than the biases: heads that had no room on the device.
    weight = stacks[0][1].weight.new_empty(len(order), n_classes, n_features).transpose(1, 2)
    joined = HeadStack(weight, empty(len(order), n_classes), empty(len(order)))
    while stacks:  # each stack's memory is given back once it is copied
        heads, stack = stacks.pop()
        joined.weight[heads], joined.bias[heads] = stack.weight, stack.bias
        joined.train_loss[heads] = stack.train_loss
    return joined
