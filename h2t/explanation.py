"""Why a prediction: what each tap, and each place of the image, adds to a logit."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.pooling import laid_out, places
from h2t.features import keep_features
from h2t.head2toe import Head


@dataclass(frozen=True)
class Explanation:
    """The parts of one logit of a linear head: they add up to it.

    ``label``: the class, by name where it has one; ``logit``; ``bias``; ``by_tap``: tap -> the sum of weight
    times normalised feature over what is kept of it, in network order. ``heat``: float32 [S, S], the parts of
    features that are averages of windows, spread evenly over the pixels of these; its sum is that of these
    parts, and ``placeless`` that of the others: means over all positions, class and register tokens, and
    maxima and standard deviations, which are no sums of parts of a place.
    """

    label: str
    logit: float
    bias: float
    by_tap: dict[str, float]
    heat: np.ndarray
    placeless: float

    def picture(self, pixels: np.ndarray) -> Image.Image:
        """The image uint8 [height, width, 3] in grey, red where it speaks for the class and blue against."""
        image = Image.fromarray(pixels).resize(self.heat.shape[::-1])
        grey = np.asarray(image.convert("L"), np.float32)[:, :, None].repeat(3, 2)
        scale = float(np.quantile(np.abs(self.heat), 0.99)) or 1.0
        strength = np.clip(np.abs(self.heat) / scale, 0, 1)[:, :, None] * 0.7
        red, blue = np.array([[220, 30, 30], [30, 60, 220]], np.float32)
        colour = np.where(self.heat[:, :, None] > 0, red, blue)
        return Image.fromarray((grey * (1 - strength) + colour * strength).astype(np.uint8))


def explain(
    head: Head,
    features: np.ndarray,
    shapes: dict[str, tuple[int, ...]],
    image_size: int,
    label: int,
    name: str,
    aggregation: Aggregation = PAPER,
    n_prefix: int = 1,
) -> Explanation:
    """The parts of the logit of the class ``label`` for one image.

    ``features`` float32 [n_features], raw; ``shapes``: of an image's activation at each tap of the head's
    layout; ``image_size``: pixels a side of the heat map; ``n_prefix``: how many class and register tokens
    come before those of patches.
    """
    inputs = keep_features(features[None], head.layout, head.kept, raw=head.raw)[0]
    parts = inputs * head.weight[:, label]
    tap_of = head.layout.tap_of(head.kept)
    by_tap: dict[str, float] = {}
    heat = np.zeros((image_size, image_size), np.float32)
    for tap in np.unique(tap_of):
        tap_name, mine = head.layout.taps[tap], tap_of == tap
        by_tap[tap_name] = float(parts[mine].sum())
        column = head.kept[mine] - head.layout.offsets[tap]
        heat += _spread(
            parts[mine],
            column,
            shapes[tap_name],
            head.hyperparameters.target_size,
            aggregation,
            n_prefix,
            image_size,
        )
    bias = float(head.bias[label])
    total = sum(by_tap.values())
    return Explanation(name, bias + total, bias, by_tap, heat, total - float(heat.sum(dtype=np.float64)))


def _spread(
    parts: np.ndarray,
    columns: np.ndarray,
    shape: tuple[int, ...],
    target_size: int,
    aggregation: Aggregation,
    n_prefix: int,
    image_size: int,
) -> np.ndarray:
    """float32 [S, S]: parts of averages of windows on the pixels of these; nothing of the other features."""
    nothing = np.zeros((image_size, image_size), np.float32)
    if len(shape) == 1:
        return nothing
    windows = places(shape, target_size, aggregation, n_prefix)
    if not any(windows):
        return nothing
    channels = shape[0] if len(shape) == 3 else shape[1]
    sums = np.bincount(columns // channels, parts, minlength=len(windows))
    beside, pooled = laid_out(shape, aggregation, n_prefix)
    grid = np.zeros(pooled[1:] if len(pooled) == 3 else (1, pooled[0]))
    for place, total in zip(windows, sums, strict=True):
        if place:
            grid[place] += total / grid[place].size
    if len(pooled) == 2:
        squares = int(shape[0] ** 0.5)  # class and register tokens come first
        tokens = np.concatenate([np.zeros(beside), grid[0]])
        grid = tokens[len(tokens) - squares**2 :].reshape(squares, squares)
    return _enlarged(grid, image_size)


def _enlarged(grid: np.ndarray, image_size: int) -> np.ndarray:
    """The sum of the grid on the pixels of an image: each cell's on those whose centres it holds."""
    rows = (np.arange(image_size) + 0.5) * grid.shape[0] // image_size
    columns = (np.arange(image_size) + 0.5) * grid.shape[1] // image_size
    row, column = rows.astype(int), columns.astype(int)
    high, wide = (np.bincount(place, minlength=n) for place, n in zip((row, column), grid.shape, strict=True))
    n_pixels = np.outer(high, wide)
    return (grid / np.maximum(n_pixels, 1))[np.ix_(row, column)].astype(np.float32)
