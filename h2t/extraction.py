"""From images to features, for as many as fit in memory."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from h2t.backbones.loading import Backbone, input_config
from h2t.backbones.pooling import ClassToken
from h2t.backbones.tap_reader import TapReader, feature_layout
from h2t.errors import UserError, unknown
from h2t.images.preprocessing import Preprocessing, Resize, prepare, to_batch
from h2t.images.source import EncodedImage, Image

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


def extract_features(
    backbone: Backbone,
    images: Sequence[Image | str | Path],
    target_size: int,
    *,
    preprocessing: Preprocessing | None = None,
    cls_token: ClassToken = "normal",
    batch_size: int = 50,
) -> np.ndarray:
    """Raw features float32 [n, n_features] of images, in the order of ``feature_layout``.

    For as many images as fit in memory; the pipelines stream the rest. Raises UserError for a single path.
    """
    preprocessing = preprocessing or preprocessing_for(backbone)
    batches = prepared_batches(images, preprocessing, batch_size)
    weight = next(backbone.model.parameters())
    width = feature_layout(backbone, target_size, cls_token).n_features
    features = np.empty((len(images), width), dtype=np.float32)
    with TapReader(backbone, [target_size], cls_token) as reader:
        for number, pixels in enumerate(batches):
            batch = to_batch(pixels, preprocessing, weight.device, weight.dtype)
            taps = reader(batch)[target_size]
            features[number * batch_size :][: len(pixels)] = torch.cat(taps, 1).cpu().numpy()
    return features


def prepared_batches(
    images: Sequence[Image | str | Path], preprocessing: Preprocessing, batch_size: int
) -> Iterator[list[np.ndarray]]:
    """Images, or those of files, as :func:`h2t.images.preprocessing.prepare` leaves them, batch by batch.

    Raises UserError for a single path, and, when its turn comes, for a file that cannot be read.
    """
    if isinstance(images, str | os.PathLike):
        raise UserError(f"expected a list of images, got one path; write ['{images}']")
    starts = range(0, len(images), batch_size)
    batches = (images[start : start + batch_size] for start in starts)
    return ([prepare(_opened(image), preprocessing) for image in batch] for batch in batches)


def _opened(image: Image | str | Path) -> Image:
    if not isinstance(image, str | os.PathLike):
        return image
    try:
        return EncodedImage(Path(image).read_bytes(), str(image))
    except OSError as error:
        raise UserError(f"cannot read the image '{image}': {error.strerror}") from error
