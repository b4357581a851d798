"""From images to features, for as many as fit in memory."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from h2t.backbones.loading import Backbone
from h2t.backbones.pooling import ClassToken
from h2t.backbones.tap_reader import TapReader, feature_layout
from h2t.errors import UserError
from h2t.images.preprocessing import Preprocessing, Resize, prepare, to_batch
from h2t.images.source import EncodedImage, Image

NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "minus_one_to_one": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def preprocessing_for(
    backbone: Backbone, resize: Resize = "bilinear", normalization: str = "backbone"
) -> Preprocessing:
    """How images reach a backbone; ``normalization`` of "backbone" takes its own mean and deviation."""
    mean, std = NORMALIZATIONS.get(normalization, (backbone.mean, backbone.std))
    return Preprocessing(image_size=backbone.image_size, resize=resize, mean=mean, std=std)


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
    if isinstance(images, str | os.PathLike):
        raise UserError(f"expected a list of images, got one path; write ['{images}']")
    preprocessing = preprocessing or preprocessing_for(backbone)
    weight = next(backbone.model.parameters())
    width = feature_layout(backbone, target_size, cls_token).n_features
    features = np.empty((len(images), width), dtype=np.float32)
    with TapReader(backbone, [target_size], cls_token) as reader:
        for start in range(0, len(images), batch_size):
            pixels = [prepare(opened(image), preprocessing) for image in images[start : start + batch_size]]
            batch = to_batch(pixels, preprocessing, weight.device, weight.dtype)
            taps = reader(batch)[target_size]
            features[start : start + batch_size] = torch.cat(taps, 1).cpu().numpy()
    return features


def opened(image: Image | str | Path) -> Image:
    """A file's image where a path is given. Raises UserError when there is no such file."""
    if not isinstance(image, str | os.PathLike):
        return image
    try:
        return EncodedImage(Path(image).read_bytes(), str(image))
    except OSError as error:
        raise UserError(f"cannot read the image '{image}': {error.strerror}") from error
