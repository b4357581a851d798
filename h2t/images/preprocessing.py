"""From decoded pixels to the tensor that a backbone reads."""

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image as PillowImage
from PIL import PngImagePlugin

from h2t.device import sent
from h2t.images.source import BadImage, Image

Resize = Literal["bilinear", "bicubic"]

# Images become float32 before they are resized: so many pixels at once. On a CPU, temporaries that fit its
# caches make 300 x 300 images several times as fast as one large one does; a GPU wants few launches.
_PIXELS_AT_ONCE_CPU = 300_000
_PIXELS_AT_ONCE_GPU = 32_000_000


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Of Pillow's, those that are opened, whatever a file is called: others, as PostScript, run programs."""
LARGEST_PIXELS = 2**26
"""Of an image: a file of a few kilobytes can say that it has billions."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes ``image_size`` x ``image_size`` normalised numbers; never cropped or flipped.

    ``bilinear`` is the official pipeline's: float, half-pixel centres, no antialiasing, aspect ratio not
    kept. ``bicubic`` is Pillow's antialiased bicubic on uint8, as later papers use it. ``mean`` and ``std``
    are in units of pixels in [0, 1]; 0.5 each gives the official range [-1, 1].
    """

    image_size: int
    resize: Resize = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


def prepare(image: Image, preprocessing: Preprocessing) -> np.ndarray:
    """The CPU worker's part, never more than 12 S^2 bytes however large the image is.

    For bicubic uint8 [S, S, 3]. For bilinear uint8 [height, width, 3] as stored, to be resized where the
    backbone runs, or, of an image that would take more memory than that, float32 [S, S, 3], resized already.

    Raises:
        BadImage: see :func:`h2t.images.decode`.
    """
    pixels = decode(image)
    size = preprocessing.image_size
    if pixels.shape[:2] == (size, size):
        return pixels
    if preprocessing.resize == "bicubic":
        return np.asarray(PillowImage.fromarray(pixels).resize((size, size), PillowImage.Resampling.BICUBIC))
    if pixels.nbytes <= 3 * 4 * size * size:
        return pixels
    return _resize(_as_batch(pixels[None], "cpu"), size)[0].permute(1, 2, 0).contiguous().numpy()


def to_batch(
    images: Sequence[np.ndarray],
    preprocessing: Preprocessing,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The backbone worker's part: images as :func:`prepare` leaves them, as one batch.

    Returns:
        ``dtype`` [b, 3, S, S] in channels-last memory, (pixel / 255 - mean) / std; computed in float32.
    """
    size = preprocessing.image_size
    shape = (len(images), 3, size, size)
    batch = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    mean, std = (_on_device(tuple(values), device) for values in (preprocessing.mean, preprocessing.std))
    at_once = _PIXELS_AT_ONCE_CPU if batch.device.type == "cpu" else _PIXELS_AT_ONCE_GPU
    for rows in _rows_of_equal_size(images, size, at_once):
        resized = _resize(_as_batch(np.stack([images[row] for row in rows]), device), size)
        consecutive = rows[-1] - rows[0] == len(rows) - 1
        place = slice(rows[0], rows[-1] + 1) if consecutive else rows  # a GPU would be waited for with a list
        batch[place] = resized.div_(255).sub_(mean).div_(std).to(dtype)
    return batch


@cache
def _on_device(values: tuple[float, float, float], device: str | torch.device) -> torch.Tensor:
    """One value per channel, float32 [3, 1, 1]."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def _rows_of_equal_size(images: Sequence[np.ndarray], size: int, pixels_at_once: int) -> list[list[int]]:
    """Rows of images that can be stacked, in chunks of so many pixels before or after resizing."""
    groups: defaultdict[tuple[int, int, np.dtype], list[int]] = defaultdict(list)
    for row, pixels in enumerate(images):
        groups[(*pixels.shape[:2], pixels.dtype)].append(row)
    chunks = []
    for (height, width, _), rows in groups.items():
        at_once = max(1, pixels_at_once // max(height * width, size * size))
        chunks += [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    return chunks


def _as_batch(pixels: np.ndarray, device: str | torch.device) -> torch.Tensor:
    """Pixels [b, height, width, 3] of either type -> float32 [b, 3, height, width], channels last."""
    return sent(torch.from_numpy(np.require(pixels, requirements="W")), device).permute(0, 3, 1, 2).float()


def _resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear, [b, 3, height, width] -> [b, 3, S, S]; the identity where the size fits already."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)


# 16-bit grey to 8-bit: 65535 / 255, so that black and white stay black and white.
_SIXTEEN_TO_EIGHT = 257
_SMALLEST_PEAK = 2**13  # an image of 16 bits whose values all lie below this may have been made with fewer
# Pillow refuses a PNG with a colour profile, which we don't use, or a text of more than 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20


def decode(image: Image) -> np.ndarray:
    """The pixels of an image as uint8 [height, width, 3].

    Grey is repeated over the channels; 16-bit grey is divided by 257 and rounded; palettes are looked up;
    CMYK is converted without a colour profile; an alpha channel is dropped, not blended, as in the official
    pipeline; of an animation the first frame counts; the orientation tag of EXIF is ignored, as officially.

    Raises:
        BadImage: no bytes, not an image of FORMATS, damaged, more than LARGEST_PIXELS, floating-point pixels,
            16-bit grey that uses an eighth of its range and would lose most of its levels, or an array that
            is not uint8 [height, width, 3].
    """
    if isinstance(image, np.ndarray):
        return _checked_array(image)
    if not image.data:
        raise BadImage(image.path, "missing or empty file, or one that may not be read")
    try:
        with PillowImage.open(io.BytesIO(image.data), formats=FORMATS) as opened:
            if opened.width * opened.height > LARGEST_PIXELS:
                raise ValueError(
                    f"{opened.width} × {opened.height} pixels; expected at most {LARGEST_PIXELS:,}"
                )
            pixels = rgb_pixels(opened)
    except PillowImage.UnidentifiedImageError:  # whose own words name a BytesIO
        raise BadImage(image.path, f"not an image: it begins with {image.data[:24]!r}") from None
    # Pillow's readers raise almost anything on damaged bytes, SyntaxError and struct.error among them.
    except Exception as error:
        raise BadImage(image.path, f"cannot be decoded: {error or type(error).__name__}") from error
    return pixels


def _checked_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise BadImage("array", f"expected uint8 [height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
    return pixels


def rgb_pixels(opened: PillowImage.Image) -> np.ndarray:
    """Pixels uint8 [height, width, 3] as :func:`decode` makes them. Raises ValueError for other kinds."""
    if opened.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if opened.mode.startswith("I"):
        return _from_sixteen_bits(np.asarray(opened))
    if opened.mode == "P" and "transparency" in opened.info:
        opened = opened.convert("RGBA")
    # Converting RGB to RGB would copy.
    return np.asarray(opened if opened.mode == "RGB" else opened.convert("RGB"))


def _from_sixteen_bits(grey: np.ndarray) -> np.ndarray:
    values = grey.astype(np.int64)
    if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"expected 16-bit grey in 0..65535, got values in {values.min()}..{values.max()}")
    eight_bits = ((values + _SIXTEEN_TO_EIGHT // 2) // _SIXTEEN_TO_EIGHT).astype(np.uint8)
    # Sensors of 12 bits, and 8-bit values in wide pixels. A range guessed image by image would make equal
    # things unequal, so there is no guess.
    if values.max() < _SMALLEST_PEAK and len(np.unique(values)) > 2 * len(np.unique(eight_bits)):
        raise ValueError(
            f"16-bit grey with values up to {values.max()} alone, of which {len(np.unique(eight_bits))} grey "
            "levels would stay; expected values that use 0..65535, or an 8-bit image"
        )
    return np.repeat(eight_bits[:, :, None], 3, axis=2)
