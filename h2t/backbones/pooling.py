"""Pooling of an activation to about ``target_size`` features (section 4 and Appendix A of the paper).

The rule is that of the official code. With C channels and a target size of T:

- C >= T: the mean over all positions, C features;
- a map of w x w: n = int(sqrt(T // C)) windows a side, so a window of w // n, moved by its size, no padding;
- t tokens: a window of int(t / (T / C)) tokens, moved by its own size, no padding;
- a window of 0 (the target is finer than the activation) falls back to the mean over all positions.

Positions beyond the last whole window are dropped. Features of a map are in (height, width, channel) order.
:class:`Aggregation` says what else can be made of windows, and of tokens.

``n_prefix``, here and below: how many class and register tokens come before those of the patches.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from h2t.backbones.aggregation import PAPER, Aggregation

Place = tuple[slice, slice]
"""Rows and columns of the positions of a window; a sequence of tokens has one row."""


def pool(activation: Tensor, target_size: int, aggregation: Aggregation = PAPER, n_prefix: int = 1) -> Tensor:
    """Pool an activation to about ``target_size`` features an example.

    ``activation``: a map [b, c, h, w], tokens [b, t, c] with the class token first, or a vector [b, c], which
    is returned as it is; any float dtype. Returns float32 [b, f] in memory of its own.
    """
    return pool_to_all(activation, (target_size,), aggregation, n_prefix)[target_size]


def pool_to_all(
    activation: Tensor, target_sizes: Sequence[int], aggregation: Aggregation = PAPER, n_prefix: int = 1
) -> dict[int, Tensor]:
    """Pool an activation as `pool` does, to each of several target sizes, sharing the work.

    Target sizes with the same window share one tensor; a window that is a whole number of finer ones is
    pooled from their means instead of from the activation.
    """
    if activation.ndim == 2 or (activation.ndim == 3 and aggregation.cls_token == "only_cls"):
        vector = activation if activation.ndim == 2 else activation[:, 0]
        return dict.fromkeys(target_sizes, vector.to(torch.float32, copy=True))
    beside, shape = laid_out(activation.shape[1:], aggregation, n_prefix)
    if activation.ndim == 4:
        positions = activation.permute(0, 2, 3, 1)
    else:
        rows = shape[1] if len(shape) == 3 else 1
        positions = activation[:, beside:].unflatten(1, (rows, -1))
    pooled: dict[Any, Tensor]
    if aggregation.pooling == "pyramid":
        cuts: dict[int, Any] = {size: levels(shape, size) for size in target_sizes}
        pooled = _pyramids(positions, set(cuts.values()))
    else:
        cuts = {size: window(shape, size) for size in target_sizes}
        pooled = _statistics(positions, set(cuts.values()), aggregation)
    if beside:
        first = activation[:, :beside].float().flatten(1)
        pooled = {cut: torch.cat([first, features], dim=1) for cut, features in pooled.items()}
    return {size: pooled[cut] for size, cut in cuts.items()}


def pooled_size(
    shape: Sequence[int], target_size: int, aggregation: Aggregation = PAPER, n_prefix: int = 1
) -> int:
    """The number of features that `pool` makes of one example's activation; ``shape`` has no batch axis."""
    if len(shape) == 1:
        return shape[0]
    channels = shape[0] if len(shape) == 3 else shape[1]
    return channels * len(places(shape, target_size, aggregation, n_prefix))


def places(
    shape: Sequence[int], target_size: int, aggregation: Aggregation = PAPER, n_prefix: int = 1
) -> list[Place | None]:
    """Which positions each run of C features is the average of, in the order of the features.

    None for those that are no average of a window: tokens that stay as they are, what is taken of all
    positions, maxima, standard deviations. ``shape``: (c, h, w) or (t, c); positions are counted in what is
    pooled, as :func:`laid_out` says.
    """
    if len(shape) == 2 and aggregation.cls_token == "only_cls":
        return [None]
    beside, pooled = laid_out(shape, aggregation, n_prefix)
    height, width = pooled[1:] if len(pooled) == 3 else (1, pooled[0])
    found: list[Place | None] = [None] * beside
    if aggregation.pooling == "pyramid":
        for n in levels(pooled, target_size):
            cells = [
                (row, column) for row in _adaptive(height, min(n, height)) for column in _adaptive(width, n)
            ]
            found += cells if n > 1 else [None]
        return found
    side = window(pooled, target_size)
    high, wide = _extent((height, width), side)
    windows: list[Place | None] = [
        (slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide)) if side else None
        for row in range(height // high)
        for column in range(width // wide)
    ]
    return found + windows + [None] * (len(windows) if _has_second(aggregation, high * wide) else 0)


def laid_out(
    shape: Sequence[int], aggregation: Aggregation = PAPER, n_prefix: int = 1
) -> tuple[int, tuple[int, ...]]:
    """How many first tokens stay as they are, and the shape of what is pooled: (c, h, w) or (t, c)."""
    if len(shape) == 3:
        return 0, tuple(shape)
    tokens, channels = shape
    if aggregation.tokens == "grid":
        for prefix in (n_prefix, 0):  # what normalises patches alone has no class token yet
            side = isqrt(max(0, tokens - prefix))
            if side and side * side == tokens - prefix:
                return prefix, (channels, side, side)
    beside = int(aggregation.cls_token == "nopool_cls")
    return beside, (tokens - beside, channels)


def window(shape: Sequence[int], target_size: int) -> int:
    """The side of a pooling window over a map (c, h, w) or tokens (t, c); 0: the mean over all positions."""
    channels = shape[0] if len(shape) == 3 else shape[1]
    if channels >= target_size:
        return 0
    if len(shape) == 2:
        return int(shape[0] / (target_size / channels))
    return min(shape[1:]) // int((target_size // channels) ** 0.5)


def levels(shape: Sequence[int], target_size: int) -> tuple[int, ...]:
    """The numbers of windows a side of a pyramid over a map (c, h, w) or tokens (t, c): 1, 2, 4 …"""
    channels = shape[0] if len(shape) == 3 else shape[1]
    room = target_size // channels  # windows
    most = min(isqrt(room), *shape[1:]) if len(shape) == 3 else min(room, shape[0])
    return tuple(1 << level for level in range(max(1, most.bit_length())))


def falls_back(
    shape: Sequence[int], target_size: int, aggregation: Aggregation = PAPER, n_prefix: int = 1
) -> bool:
    """Whether the pooling window rounds to 0, so that the official rule falls back to a global mean."""
    if len(shape) == 1 or aggregation.pooling == "pyramid":
        return False
    _, pooled = laid_out(shape, aggregation, n_prefix)
    channels = shape[0] if len(shape) == 3 else shape[1]
    return channels < target_size and window(pooled, target_size) == 0


def _adaptive(length: int, n: int) -> list[slice]:
    """The n windows of a row of positions, as ``adaptive_avg_pool2d`` has them."""
    return [slice(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]


def _pyramids(positions: Tensor, wanted: set[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
    """Averages of all windows of the levels, float32 [b, f], from positions [b, h, w, c]."""
    channels_first = positions.permute(0, 3, 1, 2).float()
    by_level = {
        n: functional.adaptive_avg_pool2d(channels_first, (min(n, positions.shape[1]), n))
        .permute(0, 2, 3, 1)
        .flatten(1)
        for n in max(wanted)
    }
    return {some: torch.cat([by_level[n] for n in some], dim=1) for some in wanted}


def _statistics(positions: Tensor, sides: set[int], aggregation: Aggregation) -> dict[int, Tensor]:
    """Features float32 [b, f] of windows of each side (0: of everything), from positions [b, h, w, c]."""
    means = _means(positions, sides)
    features = {side: mean.flatten(1) for side, mean in means.items()}
    for side, mean in means.items():
        extent = _extent(positions.shape[1:3], side)
        if _has_second(aggregation, extent[0] * extent[1]):
            windows = _in_windows(positions, *extent)
            maxima = aggregation.pooling == "average_max"
            second = windows.amax(4).amax(2).float() if maxima else _deviations(windows, mean)
            features[side] = torch.cat([features[side], second.flatten(1)], dim=1)
    return features


def _has_second(aggregation: Aggregation, n_positions: int) -> bool:
    """Whether windows of so many positions have more than their average: that of one is all there is."""
    return aggregation.pooling in ("average_max", "average_std") and n_positions > 1


def _means(positions: Tensor, sides: set[int]) -> dict[int, Tensor]:
    """Means over windows of each side (0: over everything), float32 [b, rows, columns, c].

    ``positions`` [b, h, w, c]; a height of 1 is a row of tokens, whose windows are 1 high.
    """
    means: dict[int, Tensor] = {}
    for side in sorted(sides - {0}):
        nested = max([0, *(finer for finer in means if side % finer == 0)])
        source = means[nested] if nested else positions
        means[side] = _window_means(source, side // nested if nested else side)
    if 0 in sides:
        # Windows that leave nothing over have the mean of everything as their mean.
        tiling = max([0, *(side for side in means if all(n % side == 0 for n in positions.shape[1:3]))])
        everything = means[tiling] if tiling else positions
        means[0] = everything.mean(dim=(1, 2), keepdim=True, dtype=torch.float32)
    return means


def _window_means(positions: Tensor, side: int) -> Tensor:
    """float32 [b, h // side, w // side, c] from [b, h, w, c]."""
    if side == 1:
        return positions.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return _means_of(positions, *_extent(positions.shape[1:3], side))


def _means_of(positions: Tensor, high: int, wide: int) -> Tensor:
    # Each the fastest there of the ways to write this, where channels of a position lie side by side.
    means = _means_by_pooling if positions.device.type == "cpu" else _means_by_reduction
    return means(positions, high, wide)


def _means_by_pooling(positions: Tensor, high: int, wide: int) -> Tensor:
    return functional.avg_pool2d(positions.permute(0, 3, 1, 2).float(), (high, wide)).permute(0, 2, 3, 1)


def _means_by_reduction(positions: Tensor, high: int, wide: int) -> Tensor:
    return _in_windows(positions, high, wide).mean(dim=(2, 4), dtype=torch.float32)


def _deviations(windows: Tensor, mean: Tensor) -> Tensor:
    """Standard deviations float32 [b, rows, columns, c] of windows [b, rows, high, columns, wide, c]."""
    squares = (windows - mean[:, :, None, :, None]).square()
    variance = _means_of(squares.flatten(3, 4).flatten(1, 2), windows.shape[2], windows.shape[4])
    # The slope of the root at 0 is infinite; where nothing varies, none is passed back.
    varies = variance > 0
    return torch.where(varies, variance, 1.0).sqrt() * varies


def _extent(size: Sequence[int], side: int) -> tuple[int, int]:
    """Height and width of a window of this side; 0 is everything, and in a row of tokens all are 1 high."""
    height, width = size
    return (side if height > 1 else 1, side) if side else (height, width)


def _in_windows(positions: Tensor, high: int, wide: int) -> Tensor:
    """The whole windows of positions [b, h, w, c]: a view [b, rows, high, columns, wide, c]."""
    rows, columns = positions.shape[1] // high, positions.shape[2] // wide
    whole = positions[:, : rows * high, : columns * wide]
    return whole.unflatten(2, (columns, wide)).unflatten(1, (rows, high))
