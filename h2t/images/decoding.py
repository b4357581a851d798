"""From stored bytes to uint8 RGB."""

import io

import numpy as np
from PIL import Image as PillowImage

from h2t.images.source import BadImage, Image

# 16-bit grey to 8-bit: 65535 / 255, so that black and white stay black and white.
_SIXTEEN_TO_EIGHT = 257


def decode(image: Image) -> np.ndarray:
    """The pixels of an image as uint8 [height, width, 3].

    Grey is repeated over the channels; 16-bit grey is divided by 257 and rounded; palettes are looked up;
    CMYK is converted without a colour profile; an alpha channel is dropped, not blended, as in the official
    pipeline; of an animation the first frame counts; the orientation tag of EXIF is ignored, as officially.

    Raises:
        BadImage: no bytes, not an image, damaged, too large to be one, floating-point pixels, or an array
            that is not uint8 [height, width, 3].
    """
    if isinstance(image, np.ndarray):
        return _checked_array(image)
    if not image.data:
        raise BadImage(image.path, "missing or empty file, or one that may not be read")
    try:
        with PillowImage.open(io.BytesIO(image.data)) as opened:
            pixels = _to_rgb(opened)
    # Pillow's readers raise almost anything on damaged bytes, SyntaxError and struct.error among them.
    except Exception as error:
        raise BadImage(image.path, f"cannot be decoded: {error or type(error).__name__}") from error
    return pixels


def _checked_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise BadImage("array", f"expected uint8 [height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
    return pixels


def _to_rgb(opened: PillowImage.Image) -> np.ndarray:
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
    return np.repeat(eight_bits[:, :, None], 3, axis=2)
