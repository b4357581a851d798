"""The saved result of adapting to a task: a head, what it kept, and enough to predict new images with it.

A head is one safetensors file: tensors ``kept``, ``weight`` and ``bias``, and a single metadata entry of JSON
that holds the rest. Equal heads give equal bytes.
"""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy.special import softmax

from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.pooling import ClassToken
from h2t.backbones.tap_reader import feature_layout
from h2t.errors import UserError
from h2t.extraction import extract_features, preprocessing_for
from h2t.features import FeatureLayout
from h2t.head2toe import Head, predict
from h2t.hyperparameters import Hyperparameters
from h2t.images.preprocessing import Preprocessing
from h2t.images.source import Image

FORMAT = "head2toe-head-1"
ENTRY = "head"


class Prediction(NamedTuple):
    """Predicted class names or numbers [n], and probabilities of all classes float32 [n, n_classes]."""

    labels: np.ndarray
    probabilities: np.ndarray


def save_head(
    head: Head,
    destination: BinaryIO | str | Path,
    *,
    provenance: dict[str, str],
    classes: int | Sequence[str],
) -> None:
    """Write a head as safetensors.

    ``classes``: their number, or their names in the order of the labels. ``provenance``: whatever should
    travel with the head; ``Adapter.load`` needs the entry ``backbone``, a recipe's section of that name as
    JSON.
    """
    n_classes = classes if isinstance(classes, int) else len(classes)
    if n_classes != head.weight.shape[1]:
        raise UserError(f"save_head: {n_classes} classes are named, but the head has {head.weight.shape[1]}")
    content = {
        "format": FORMAT,
        "settings": asdict(head.settings),
        "seed": head.seed,
        "train_loss": head.train_loss,
        "taps": list(head.layout.taps),
        "widths": list(head.layout.widths),
        "classes": classes if isinstance(classes, int) else list(classes),
        "provenance": provenance,
    }
    tensors: dict[str, np.ndarray] = {
        "kept": np.ascontiguousarray(head.kept, dtype=np.int64),
        "weight": np.ascontiguousarray(head.weight, dtype=np.float32),
        "bias": np.ascontiguousarray(head.bias, dtype=np.float32),
    }
    # safetensors writes several metadata entries in any order, but a single one always alike.
    data = save(tensors, metadata={ENTRY: json.dumps(content, sort_keys=True)})
    if isinstance(destination, str | os.PathLike):
        Path(destination).write_bytes(data)
    else:
        destination.write(data)


def load_head(source: bytes | BinaryIO | str | Path) -> tuple[Head, dict[str, str]]:
    """Read a head and its provenance. Raises UserError on anything that is not a whole, consistent head."""
    head, content = _read(source)
    return head, content["provenance"]


class Adapter:
    """A frozen backbone with a head on it: images in, classes out.

    ``classes``: names in the order of the labels; numbers if not given.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        *,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        cls_token: ClassToken = "normal",
    ) -> None:
        layout = feature_layout(backbone, head.settings.target_size, cls_token)
        if layout != head.layout:
            raise UserError(
                f"the head was trained on other features than {backbone.name} gives: expected "
                f"{head.layout.n_features} of {len(head.layout.taps)} taps, got {layout.n_features} of "
                f"{len(layout.taps)}; check image size, taps and class token"
            )
        self.backbone, self.head, self.cls_token = backbone, head, cls_token
        self.preprocessing = preprocessing or preprocessing_for(backbone)
        self.classes = np.arange(head.weight.shape[1]) if classes is None else np.asarray(classes)

    @classmethod
    def load(cls, source: bytes | BinaryIO | str | Path, device: str = "cpu") -> "Adapter":
        """An adapter from a saved head, with the backbone that its provenance names."""
        head, content = _read(source)
        settings = _backbone_settings(content["provenance"])
        names = ("name", "weights", "image_size", "taps", "dtype", "sha256")
        given = {name: settings[name] for name in names if settings.get(name) is not None}
        backbone = load_backbone(**given, device=device)
        return cls(
            backbone,
            head,
            classes=None if isinstance(content["classes"], int) else content["classes"],
            preprocessing=preprocessing_for(
                backbone, settings.get("resize", "bilinear"), settings.get("normalization", "backbone")
            ),
            cls_token=settings.get("cls_token", "normal"),
        )

    def predict(self, images: Sequence[Image | str | Path], batch_size: int = 50) -> Prediction:
        """Classes and probabilities of images: encoded, files, or uint8 arrays [height, width, 3]."""
        features = extract_features(
            self.backbone,
            images,
            self.head.settings.target_size,
            preprocessing=self.preprocessing,
            cls_token=self.cls_token,
            batch_size=batch_size,
        )
        probabilities = softmax(predict(self.head, features), axis=1)
        return Prediction(self.classes[probabilities.argmax(1)], probabilities)


def _read(source: bytes | BinaryIO | str | Path) -> tuple[Head, dict[str, Any]]:
    name = str(source) if isinstance(source, str | os.PathLike) else "head"
    try:
        data = _bytes(source)
        tensors, content = load(data), _content(data)
        head = Head(
            Hyperparameters(**content["settings"]),
            content["seed"],
            tensors["kept"],
            FeatureLayout(tuple(content["taps"]), tuple(content["widths"])),
            tensors["weight"],
            tensors["bias"],
            content["train_loss"],
        )
    except OSError as error:
        raise UserError(f"cannot read '{name}': {error.strerror}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, struct.error) as error:
        raise UserError(f"'{name}' is not a head saved by this package, or is damaged: {error}") from error
    problem = _inconsistency(head)
    if problem:
        raise UserError(f"'{name}' is not a consistent head: {problem}")
    return head, content


def _bytes(source: bytes | BinaryIO | str | Path) -> bytes:
    if isinstance(source, bytes):
        return source
    return Path(source).read_bytes() if isinstance(source, str | os.PathLike) else source.read()


def _content(data: bytes) -> dict[str, Any]:
    """The metadata entry: the file's header is a little-endian uint64 length and as many bytes of JSON."""
    (length,) = struct.unpack_from("<Q", data)
    content = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][ENTRY])
    if content["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {content['format']}")
    return content


def _inconsistency(head: Head) -> str:
    """What does not fit together in a head; nothing if all does."""
    kept, weight, bias = head.kept, head.weight, head.bias
    if kept.ndim != 1 or weight.ndim != 2 or len(kept) != len(weight) or bias.shape != weight.shape[1:]:
        return f"kept {kept.shape}, weight {weight.shape} and bias {bias.shape} do not match"
    if len(kept) and (kept[0] < 0 or kept[-1] >= head.layout.n_features or (np.diff(kept) <= 0).any()):
        return f"kept features are not ascending indices below {head.layout.n_features}"
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return "weights are not finite"
    return ""


def _backbone_settings(provenance: dict[str, str]) -> dict[str, Any]:
    if "backbone" not in provenance:
        raise UserError("the head does not say which backbone it belongs to; use Adapter(backbone, head)")
    settings = provenance["backbone"]
    return json.loads(settings) if settings.startswith("{") else {"name": settings}
