"""From images to features, for as many as fit in memory."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image as PillowImage

from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.loading import Backbone, input_config
from h2t.backbones.tap_reader import TapReader, feature_layout
from h2t.device import fetched
from h2t.errors import UserError, unknown
from h2t.feature_columns import tap_columns, tap_fields
from h2t.images.preprocessing import Preprocessing, Resize, prepare, rgb_pixels, to_batch
from h2t.images.source import EncodedImage, Image

AnyImage = Image | str | Path | bytes | BinaryIO | PillowImage.Image
"""What users have: a path, encoded bytes or an open file of them, Pillow's image, or uint8 [h, w, 3]."""

_KINDS = (EncodedImage, np.ndarray, str, os.PathLike, bytes, PillowImage.Image)
_EXPECTED = "a path, encoded bytes, an open file, a Pillow image or a NumPy array uint8 [height, width, 3]"

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and standard deviation

NORMALIZATIONS: dict[str, Normalization] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "minus_one_to_one": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def preprocessing_for(
    backbone: Backbone, resize: Resize = "bilinear", normalization: str = "backbone"
) -> Preprocessing:
    """The preprocessing of a backbone's images; ``normalization`` "backbone": its own mean and deviation."""
    return _preprocessing(backbone.image_size, resize, normalization, (backbone.mean, backbone.std))


def preprocessing_config(
    name: str, image_size: int | None = None, resize: Resize = "bilinear", normalization: str = "backbone"
) -> Preprocessing:
    """The preprocessing for the backbone that ``load_backbone`` would load, which is not built for it."""
    size, config = input_config(name, image_size)
    return _preprocessing(size, resize, normalization, (config.mean, config.std))


def _preprocessing(
    image_size: int, resize: Resize, normalization: str, of_backbone: Normalization
) -> Preprocessing:
    normalizations = {"backbone": of_backbone, **NORMALIZATIONS}
    if normalization not in normalizations:
        raise unknown("normalization", normalization, normalizations)
    mean, std = normalizations[normalization]
    return Preprocessing(image_size, resize, mean, std)


def write_features(
    backbone: Backbone,
    images: Iterable[AnyImage],
    target_size: int,
    destination: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    aggregation: Aggregation = PAPER,
    batch_size: int = 50,
) -> Path:
    """Write raw features of any number of images as Parquet: a row each, ``index`` and a list per tap.

    Memory holds one batch; the file appears whole or not at all. Raises as :func:`prepared_batches`.
    """
    images, destination = listed_images(images), Path(destination)
    batches = _feature_batches(backbone, images, target_size, preprocessing, aggregation, batch_size)
    layout = feature_layout(backbone, target_size, aggregation)
    schema = pa.schema([pa.field("index", pa.int32(), nullable=False), *tap_fields(layout)])
    temporary = destination.with_name(f".tmp-{destination.name}")
    try:
        with pq.ParquetWriter(temporary, schema, use_dictionary=False, write_statistics=False) as writer:
            start = 0
            for taps in batches:
                index = pa.array(range(start, start := start + len(taps[0])), pa.int32())
                writer.write_table(pa.Table.from_arrays([index, *tap_columns(taps, layout)], schema=schema))
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)
    return destination


def extract_features(
    backbone: Backbone,
    images: Iterable[AnyImage],
    target_size: int,
    *,
    preprocessing: Preprocessing | None = None,
    aggregation: Aggregation = PAPER,
    batch_size: int = 50,
) -> np.ndarray:
    """Raw features float32 [n, n_features] of images, in the order of ``feature_layout``.

    For as many images as fit in memory; :func:`write_features` streams the rest. Raises as
    :func:`prepared_batches`.
    """
    images = listed_images(images)
    width = feature_layout(backbone, target_size, aggregation).n_features
    features = np.empty((len(images), width), dtype=np.float32)
    batches = _feature_batches(backbone, images, target_size, preprocessing, aggregation, batch_size)
    for number, taps in enumerate(batches):
        features[number * batch_size :][: len(taps[0])] = fetched([torch.cat(taps, 1)])[0].numpy()
    return features


def _feature_batches(
    backbone: Backbone,
    images: list[AnyImage],
    target_size: int,
    preprocessing: Preprocessing | None,
    aggregation: Aggregation,
    batch_size: int,
) -> Iterator[list[torch.Tensor]]:
    """Features of one batch of images after the other, float32 [b, width] per tap in order."""
    preprocessing = preprocessing or preprocessing_for(backbone)
    weight = next(backbone.model.parameters())
    with TapReader(backbone, [target_size], aggregation) as reader:
        for pixels in prepared_batches(images, preprocessing, batch_size):
            yield reader(to_batch(pixels, preprocessing, weight.device, weight.dtype))[target_size]


def prepared_batches(
    images: Iterable[AnyImage], preprocessing: Preprocessing, batch_size: int
) -> Iterator[list[np.ndarray]]:
    """Images as :func:`h2t.images.preprocessing.prepare` leaves them, batch by batch.

    Raises UserError for anything but images, such as a single one, and, when its turn comes, for a file that
    cannot be read; BadImage for what is no image.
    """
    listed = listed_images(images)
    batches = (listed[start : start + batch_size] for start in range(0, len(listed), batch_size))
    return ([prepare(image, preprocessing) for image in map(_opened, batch)] for batch in batches)


def listed_images(images: Iterable[AnyImage]) -> list[AnyImage]:
    """A list of images. Raises UserError for one image, and for members that are none."""
    one = isinstance(images, str | bytes | os.PathLike | PillowImage.Image | EncodedImage)
    if one or hasattr(images, "read") or not isinstance(images, Iterable):
        shown = f"'{images}'" if isinstance(images, str | os.PathLike) else f"one {type(images).__name__}"
        raise UserError(f"expected a list of images, got {shown}; put it into [ ]")
    listed = list(images)
    for position, image in enumerate(listed):
        if not isinstance(image, _KINDS) and not hasattr(image, "read"):
            raise UserError(
                f"image {position}: expected {_EXPECTED}, got {type(image).__module__}.{type(image).__name__}"
            )
    return listed


def _opened(image: AnyImage) -> Image:
    if isinstance(image, EncodedImage | np.ndarray):
        return image
    if isinstance(image, PillowImage.Image):
        return rgb_pixels(image)
    if isinstance(image, bytes):
        return EncodedImage(image, "the given bytes")
    if not isinstance(image, str | os.PathLike):
        return EncodedImage(image.read(), str(getattr(image, "name", "the given file")))
    try:
        return EncodedImage(Path(image).read_bytes(), str(image))
    except OSError as error:
        raise UserError(f"cannot read the image '{image}': {error.strerror}") from error
