"""The saved result of adapting to a task: a head, what it kept, and enough to predict new images with it.

A head is one safetensors file, and a single metadata entry that holds what is not a tensor (``h2t.packed``;
``h2t inspect`` shows it):

- ``kept`` int32 [n_kept], the kept features, ascending; or ``kept_bitmap`` uint8, one bit for each of the N
  features, the lowest bit of a byte first; whichever is smaller;
- ``weight`` [n_kept, n_classes], float32 or float16, or int8 with ``scale`` float32 [n_classes], which the
  column of a class is multiplied by;
- ``bias`` float32 [n_classes];
- of nearest neighbours ``neighbours`` int64, their labels: the columns of weight and bias are training rows.

Equal heads give equal bytes. A fine-tuned model is what ``finetuning.save_model`` gives.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy.special import softmax
from torch import Tensor, nn
from torch.nn import functional

from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.loading import Backbone
from h2t.backbones.pair import load_section
from h2t.backbones.tap_reader import feature_layout, tap_shapes
from h2t.checksum import check_digest, tensor_digest
from h2t.errors import UserError, unknown
from h2t.explanation import Explanation, explain
from h2t.extraction import AnyImage, extract_features, prepared_batches, preprocessing_for
from h2t.features import FeatureLayout
from h2t.finetuning import (
    MODEL,
    FinetuneOptions,
    TrainableModel,
    load_model,
    out_of_memory,
    read_metadata,
)
from h2t.head2toe import Head, logits
from h2t.heads.neighbours import Neighbours
from h2t.hyperparameters import Hyperparameters
from h2t.images.preprocessing import Preprocessing, to_batch
from h2t.packed import pack
from h2t.shared_pass import SharedPass

FORMAT = "head2toe-head-5"
EARLIER = ("head2toe-head-4", "head2toe-head-3")  # whose metadata is JSON as it is; the 3rd has kept in int64
ENTRY = "head"
WeightType = Literal["float32", "float16", "int8"]


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
    weights: WeightType = "float32",
) -> None:
    """Write a head as safetensors.

    ``classes``: their number, or their names in the order of the labels. ``provenance``: whatever should
    travel with the head; ``Adapter.load`` needs the entry ``backbone``, a recipe's section of that name as
    JSON. ``weights``: as what they are stored.
    """
    check_weight_type(weights)
    n_classes = classes if isinstance(classes, int) else len(classes)
    if n_classes != head.n_classes:
        raise UserError(f"save_head: {n_classes} classes are named, but the head has {head.n_classes}")
    content = {
        "format": FORMAT,
        "hyperparameters": asdict(head.hyperparameters),
        "seed": head.seed,
        "train_loss": head.train_loss,
        "taps": list(head.layout.taps),
        "widths": list(head.layout.widths),
        "classes": classes if isinstance(classes, int) else list(classes),
        "provenance": provenance,
        "raw": head.raw,
        "neighbours": head.neighbours and head.neighbours.k,
    }
    tensors = _stored_kept(head) | _stored_weight(head.weight, weights)
    tensors["bias"] = np.ascontiguousarray(head.bias, dtype=np.float32)
    if head.neighbours:
        tensors["neighbours"] = np.ascontiguousarray(head.neighbours.labels, dtype=np.int64)
    content["sha256"] = tensor_digest(save(tensors))
    # safetensors writes several metadata entries in any order, but a single one always alike.
    data = save(tensors, metadata={ENTRY: pack(content)})
    if isinstance(destination, str | os.PathLike):
        Path(destination).write_bytes(data)
    else:
        destination.write(data)


def check_weight_type(weights: str) -> WeightType:
    """The type itself. Raises UserError for one that is not known."""
    for known in get_args(WeightType):
        if weights == known:
            return known
    raise unknown("type of weights", weights, get_args(WeightType))


def _stored_kept(head: Head) -> dict[str, np.ndarray]:
    if 32 * len(head.kept) <= head.layout.n_features:
        return {"kept": np.ascontiguousarray(head.kept, dtype=np.int32)}
    chosen = np.zeros(head.layout.n_features, dtype=bool)
    chosen[head.kept] = True
    return {"kept_bitmap": np.packbits(chosen, bitorder="little")}


def _stored_weight(weight: np.ndarray, kind: WeightType) -> dict[str, np.ndarray]:
    if kind != "int8":
        return {"weight": np.ascontiguousarray(weight, dtype=kind)}
    largest = np.abs(weight).max(0, initial=0.0).astype(np.float32)
    scale = np.where(largest > 0, largest / 127, np.float32(1))
    return {"weight": np.ascontiguousarray(np.rint(weight / scale), dtype=np.int8), "scale": scale}


def _read_kept(tensors: dict[str, np.ndarray], n_features: int) -> np.ndarray:
    if "kept" in tensors:
        return tensors["kept"].astype(np.int64)
    bitmap = tensors["kept_bitmap"]
    if len(bitmap) != -(-n_features // 8):
        raise ValueError(f"{8 * len(bitmap)} bits for {n_features} features")
    return np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))


def _read_weight(tensors: dict[str, np.ndarray]) -> np.ndarray:
    weight = tensors["weight"].astype(np.float32)
    return weight * tensors["scale"] if "scale" in tensors else weight


def convert_head(
    source: bytes | BinaryIO | str | Path, destination: BinaryIO | str | Path, weights: WeightType
) -> None:
    """Write a saved head again with its weights as another type. Raises UserError as :func:`load_head`."""
    name, data = _read(source)
    with _naming(name, "head"):
        head, content = _head(data)
    save_head(
        head, destination, provenance=content["provenance"], classes=content["classes"], weights=weights
    )


def class_names(source: bytes | BinaryIO | str | Path) -> list[str]:
    """The names of the classes of a saved head or fine-tuned model, numbers where it has none.

    No backbone is loaded for it. Raises UserError for a file that is neither, or is damaged.
    """
    name, data = _read(source)
    with _naming(name, "head or model"):
        metadata = read_metadata(data)
        described = metadata[MODEL] if MODEL in metadata else metadata[ENTRY]
        check_digest(data, described["sha256"])
        classes = described.get("content", described)["classes"]
        return [str(label) for label in (range(classes) if isinstance(classes, int) else classes)]


def load_head(source: bytes | BinaryIO | str | Path) -> tuple[Head, dict[str, str]]:
    """Read a head and its provenance. Raises UserError on anything that is not a whole, consistent head."""
    name, data = _read(source)
    with _naming(name, "head"):
        head, content = _head(data)
    return head, content["provenance"]


class Adapter(nn.Module):
    """A backbone with a head on it: images in, classes out. As a module: pixels in, logits out.

    ``head``: a trained head on the frozen backbone, or the fine-tuned model, which has one of its own.
    ``classes``: names in the order of the labels; numbers if not given.

    It is in evaluation mode, and its weights want no gradients until ``requires_grad_`` says so. Its
    ``state_dict`` has the weights of both, where the file that :func:`save_head` writes has the head alone.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: Head | TrainableModel,
        *,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        aggregation: Aggregation = PAPER,
    ) -> None:
        super().__init__()
        if isinstance(head, Head):
            _check_layout(backbone, head, aggregation)
        n_classes = head.n_classes if isinstance(head, Head) else len(head.head.bias)
        self.backbone, self.aggregation = backbone, aggregation
        self.preprocessing = preprocessing or preprocessing_for(backbone)
        self.classes = np.arange(n_classes) if classes is None else np.asarray(classes)
        # In a tuple, lest a fine-tuned model be registered twice.
        self._head = (head,)
        self.model = SharedPass(backbone, [head], aggregation) if isinstance(head, Head) else head
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.preprocessing, name), device=self.device)
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)
        self.eval()

    @property
    def head(self) -> Head | TrainableModel:
        """The trained head, or the fine-tuned model."""
        return self._head[0]

    @classmethod
    def load(cls, source: bytes | BinaryIO | str | Path, device: str = "cpu") -> "Adapter":
        """An adapter from a saved head, with the backbone that it names, or from a saved fine-tuned model.

        Raises UserError for any other file, and for one that does not name its backbone.
        """
        name, data = _read(source)
        with _naming(name, "head or model"):
            metadata = read_metadata(data)
            if MODEL in metadata:
                return cls._of_model(data, metadata[MODEL], device)
            head, content = _head(data)
        section = _backbone_section(content["provenance"])
        backbone = _backbone(section, device)
        return cls(backbone, head, **_settings(backbone, section, content))

    @classmethod
    def _of_model(cls, data: bytes, described: dict[str, Any], device: str) -> "Adapter":
        section = _backbone_section(described["content"])
        # The weights are in the file, and float32 whatever the training computed in.
        backbone = _backbone(section | {"weights": "random", "sha256": None, "precision": "float32"}, device)
        settings = _settings(backbone, section, described["content"])
        options = FinetuneOptions(precision=described["precision"])
        model, _ = load_model(data, backbone, options, settings["aggregation"])
        return cls(backbone, model, **settings)

    def predict(self, images: Iterable[AnyImage], batch_size: int = 50) -> Prediction:
        """Classes and probabilities of images of any kind (see :data:`h2t.extraction.AnyImage`).

        Raises UserError for anything else, such as a single one, and BadImage for what cannot be decoded.
        """
        probabilities = softmax(self._logits(images, batch_size), axis=1)
        return Prediction(self.classes[probabilities.argmax(1)], probabilities)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits float32 [b, n_classes] of pixels, any number type [b, 3, height, width], RGB from 0 to 255.

        With bilinear resizing images may have any size; with bicubic, which is Pillow's, they come resized
        by it. Raises UserError for other shapes.
        """
        side, shape = self.preprocessing.image_size, tuple(pixels.shape)
        bilinear = self.preprocessing.resize == "bilinear"
        if len(shape) != 4 or shape[1] != 3 or not (bilinear or shape[2:] == (side, side)):
            sides = "height, width" if bilinear else f"{side}, {side}"
            raise UserError(f"expected pixels of shape [n, 3, {sides}], got {list(shape)}")
        values = pixels.float()
        if bilinear:
            values = functional.interpolate(values, (side, side), mode="bilinear", align_corners=False)
        return self._of_batch((values / 255 - self.mean) / self.std)

    def _of_batch(self, images: Tensor) -> Tensor:
        """Logits float32 [b, n_classes] of images as the backbone takes them, float [b, 3, S, S]."""
        logits = self.model(images)
        return logits[0] if isinstance(self.model, SharedPass) else logits

    def _logits(self, images: Iterable[AnyImage], batch_size: int) -> np.ndarray:
        parts = [np.empty((0, len(self.classes)), np.float32)]
        message = f"predicting {batch_size} images at once does not fit in memory"
        with torch.no_grad(), out_of_memory(message):
            for batch in prepared_batches(images, self.preprocessing, batch_size):
                parts.append(self._of_batch(to_batch(batch, self.preprocessing, self.device)).cpu().numpy())
        return np.concatenate(parts)

    def explain(self, image: AnyImage, label: int | None = None) -> Explanation:
        """What each tap and each place of an image add to a logit: of the class ``label``, or the predicted.

        Raises UserError for a head that is no linear one on a frozen backbone, and as :meth:`predict`.
        """
        head = self.head
        if not isinstance(head, Head) or head.neighbours:
            raise UserError("only linear heads on frozen backbones can be explained")
        size = head.hyperparameters.target_size
        features = extract_features(
            self.backbone, [image], size, preprocessing=self.preprocessing, aggregation=self.aggregation
        )
        chosen = int(logits(head, features)[0].argmax()) if label is None else label
        if not 0 <= chosen < head.n_classes:
            raise UserError(f"expected a label in 0..{head.n_classes - 1}, got {chosen}")
        return explain(
            head, features[0], tap_shapes(self.backbone), self.preprocessing.image_size, chosen,
            str(self.classes[chosen]), self.aggregation, self.backbone.n_prefix,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device


def _check_layout(backbone: Backbone, head: Head, aggregation: Aggregation) -> None:
    layout = feature_layout(backbone, head.hyperparameters.target_size, aggregation)
    if layout != head.layout:
        raise UserError(
            f"the head was trained on other features than {backbone.name} gives: expected "
            f"{head.layout.n_features} of {len(head.layout.taps)} taps, got {layout.n_features} of "
            f"{len(layout.taps)}; check image size, taps and aggregation"
        )


def _read(source: bytes | BinaryIO | str | Path) -> tuple[str, bytes]:
    """The name of a file, for messages, and its content."""
    if isinstance(source, bytes):
        return "the given bytes", source
    if not isinstance(source, str | os.PathLike):
        return "the given bytes", source.read()
    try:
        return f"'{source}'", Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{source}': {error.strerror}") from error


@contextmanager
def _naming(name: str, kind: str) -> Iterator[None]:
    """Turn what a file raises that is foreign or damaged into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name} is not a {kind} saved by this package, or is damaged: {error}") from error


def _head(data: bytes) -> tuple[Head, dict[str, Any]]:
    """A head and the rest of its metadata. Raises ValueError, among others, where that is not what it is."""
    tensors, metadata = load(data), read_metadata(data)
    if ENTRY not in metadata:
        raise ValueError(f"no entry '{ENTRY}' in its metadata")
    content = metadata[ENTRY]
    if content["format"] not in (FORMAT, *EARLIER):
        raise ValueError(f"expected format {FORMAT}, got {content['format']}")
    classes, k = content["classes"], content["neighbours"]
    n_classes = classes if isinstance(classes, int) else len(classes)
    layout = FeatureLayout(tuple(content["taps"]), tuple(content["widths"]))
    head = Head(
        Hyperparameters(**content["hyperparameters"]),
        content["seed"],
        _read_kept(tensors, layout.n_features),
        layout,
        _read_weight(tensors),
        tensors["bias"],
        content["train_loss"],
        content["raw"],
        Neighbours(k, tensors["neighbours"], n_classes) if k else None,
    )
    _check_consistency(head)
    check_digest(data, content["sha256"])
    return head, content


def _check_consistency(head: Head) -> None:
    kept, weight, bias = head.kept, head.weight, head.bias
    if kept.ndim != 1 or weight.ndim != 2 or len(kept) != len(weight) or bias.shape != weight.shape[1:]:
        raise ValueError(f"kept {kept.shape}, weight {weight.shape} and bias {bias.shape} do not match")
    if len(kept) and (kept[0] < 0 or kept[-1] >= head.layout.n_features or (np.diff(kept) <= 0).any()):
        raise ValueError(f"kept features are not ascending indices below {head.layout.n_features}")
    if head.neighbours and head.neighbours.labels.shape != bias.shape:
        raise ValueError(f"{len(bias)} neighbours have {len(head.neighbours.labels)} labels")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ValueError("weights are not finite")


def _backbone_section(content: dict[str, Any]) -> dict[str, Any]:
    """The recipe's section of that name; in the provenance of a head it is text."""
    section = content.get("backbone")
    if not section:
        raise UserError("the head does not say which backbone it belongs to; use Adapter(backbone, head)")
    if isinstance(section, str):
        return json.loads(section) if section.startswith("{") else {"name": section}
    return section


def _backbone(section: dict[str, Any], device: str) -> Backbone:
    return load_section(section, device)


def _settings(backbone: Backbone, section: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an adapter."""
    resize, normalization = section.get("resize", "bilinear"), section.get("normalization", "backbone")
    return {
        "classes": content["classes"] if isinstance(content.get("classes"), list) else None,
        "preprocessing": preprocessing_for(backbone, resize, normalization),
        "aggregation": Aggregation.of(section),
    }
