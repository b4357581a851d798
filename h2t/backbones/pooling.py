"""Average pooling of an activation to about ``target_size`` features (section 4 and Appendix A of the paper).

The rule is that of the official code. With C channels and a target size of T:

- C >= T: the mean over all positions, C features;
- a map of w x w: n = int(sqrt(T // C)) windows a side, so a window of w // n, moved by its size, no padding;
- t tokens: a window of int(t / (T / C)) tokens, moved by its own size, no padding;
- a window of 0 (the target is finer than the activation) falls back to the mean over all positions.

Positions beyond the last whole window are dropped. Features of a map are in (height, width, channel) order.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ClassToken = Literal["normal", "only_cls", "nopool_cls"]
CLASS_TOKEN_TREATMENTS: tuple[ClassToken, ...] = ("normal", "only_cls", "nopool_cls")


def pool(activation: Tensor, target_size: int, cls_token: ClassToken = "normal") -> Tensor:
    """Pool an activation to about ``target_size`` features an example.

    ``activation``: a map [b, c, h, w], tokens [b, t, c] with the class token first, or a vector [b, c], which
    is returned as it is; any float dtype. Returns float32 [b, f] in memory of its own.

    ``cls_token`` (Table 7): "normal" pools the class token like any other, "only_cls" takes it alone,
    "nopool_cls" puts it before the pooled others.
    """
    return pool_to_all(activation, (target_size,), cls_token)[target_size]


def pool_to_all(
    activation: Tensor, target_sizes: Sequence[int], cls_token: ClassToken = "normal"
) -> dict[int, Tensor]:
    """Pool an activation as `pool` does, to each of several target sizes, sharing the work.

    Target sizes with the same window share one tensor; a window that is a whole number of finer ones is
    pooled from their means instead of from the activation.
    """
    if activation.ndim == 2 or (activation.ndim == 3 and cls_token == "only_cls"):
        vector = activation if activation.ndim == 2 else activation[:, 0]
        return dict.fromkeys(target_sizes, vector.to(torch.float32, copy=True))
    if activation.ndim == 3:
        return _pool_tokens(activation, target_sizes, keep_first=cls_token == "nopool_cls")
    positions = activation.permute(0, 2, 3, 1)
    windows = {size: window(activation.shape[1:], size) for size in target_sizes}
    means = _means(positions, set(windows.values()))
    return {size: means[windows[size]] for size in target_sizes}


def pooled_size(shape: Sequence[int], target_size: int, cls_token: ClassToken = "normal") -> int:
    """The number of features that `pool` makes of one example's activation; ``shape`` has no batch axis."""
    if len(shape) == 1:
        return shape[0]
    if len(shape) == 3:
        channels, height, width = shape
        side = window(shape, target_size)
        return channels * (height // side) * (width // side) if side else channels
    tokens, channels = shape
    if cls_token == "only_cls":
        return channels
    kept = int(cls_token == "nopool_cls")
    side = window((tokens - kept, channels), target_size)
    return channels * ((tokens - kept) // side if side else 1) + channels * kept


def window(shape: Sequence[int], target_size: int) -> int:
    """The side of a pooling window over a map (c, h, w) or tokens (t, c); 0: the mean over all positions."""
    channels = shape[0] if len(shape) == 3 else shape[1]
    if channels >= target_size:
        return 0
    if len(shape) == 2:
        return int(shape[0] / (target_size / channels))
    return min(shape[1:]) // int((target_size // channels) ** 0.5)


def falls_back(shape: Sequence[int], target_size: int) -> bool:
    """Whether the pooling window rounds to 0, so that the official rule falls back to a global mean."""
    if len(shape) == 1:
        return False
    channels = shape[0] if len(shape) == 3 else shape[1]
    return channels < target_size and window(shape, target_size) == 0


def _pool_tokens(activation: Tensor, target_sizes: Sequence[int], keep_first: bool) -> dict[int, Tensor]:
    rest = activation[:, 1:] if keep_first else activation
    windows = {size: window(rest.shape[1:], size) for size in target_sizes}
    means = _means(rest.unsqueeze(1), set(windows.values()))
    if keep_first:
        first = activation[:, 0].float()
        means = {side: torch.cat([first, pooled], dim=1) for side, pooled in means.items()}
    return {size: means[windows[size]] for size in target_sizes}


def _means(positions: Tensor, sides: set[int]) -> dict[int, Tensor]:
    """Means over windows of each side (0: over everything), float32 [b, f], from positions [b, h, w, c].

    A height of 1 is a row of tokens, whose windows are 1 high.
    """
    means: dict[int, Tensor] = {}
    for side in sorted(sides - {0}):
        nested = max([0, *(finer for finer in means if side % finer == 0)])
        source = means[nested] if nested else positions
        means[side] = _window_means(source, side // nested if nested else side)
    if 0 in sides:
        # Windows that leave nothing over have the mean of everything as their mean.
        tiling = max([0, *(side for side in means if all(n % side == 0 for n in positions.shape[1:3]))])
        means[0] = (means[tiling] if tiling else positions).mean(dim=(1, 2), dtype=torch.float32)
    return {side: pooled.flatten(1) for side, pooled in means.items()}


def _window_means(positions: Tensor, side: int) -> Tensor:
    """float32 [b, h // side, w // side, c] from [b, h, w, c]."""
    if side == 1:
        return positions.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    high = 1 if positions.shape[1] == 1 else side
    # Each the fastest there of the ways to write this, where channels of a position lie side by side.
    means = _means_by_pooling if positions.device.type == "cpu" else _means_by_reduction
    return means(positions, high, side)


def _means_by_pooling(positions: Tensor, high: int, wide: int) -> Tensor:
    return functional.avg_pool2d(positions.permute(0, 3, 1, 2).float(), (high, wide)).permute(0, 2, 3, 1)


def _means_by_reduction(positions: Tensor, high: int, wide: int) -> Tensor:
    rows, columns = positions.shape[1] // high, positions.shape[2] // wide
    whole = positions[:, : rows * high, : columns * wide]
    windows = whole.unflatten(2, (columns, wide)).unflatten(1, (rows, high))
    return windows.mean(dim=(2, 4), dtype=torch.float32)
