"""An adapter as a module from pixels to logits, and as a file for programs without PyTorch."""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from h2t.adapter import Adapter
from h2t.backbones.tap_reader import TapReader
from h2t.errors import UserError
from h2t.features import unit_norm
from h2t.finetuning import TrainableModel
from h2t.head2toe import Head

INPUT, OUTPUT = "pixels", "logits"


class PixelsToLogits(nn.Module):
    """An adapter from pixels to logits, preprocessing included.

    Takes float [b, 3, height, width], RGB from 0 to 255. Backbones with bilinear resizing take any height and
    width; those with bicubic, which is Pillow's, take images that were resized by it. Gives float32
    [b, n_classes]; a softmax makes them probabilities.

    Raises UserError for nearest neighbours, which have no logits of this form.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.preprocessing = adapter.preprocessing
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.preprocessing, name), device=adapter.device)
            self.register_buffer(name, 255 * values.view(1, 3, 1, 1))
        head = adapter.head
        self.model = head if isinstance(head, TrainableModel) else _FrozenWithHead(adapter, head)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits float32 [b, n_classes]."""
        if self.preprocessing.resize == "bilinear":
            side = self.preprocessing.image_size
            pixels = functional.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)
        return self.model((pixels - self.mean) / self.std)


class _FrozenWithHead(nn.Module):
    """A frozen backbone with the head on what it keeps."""

    def __init__(self, adapter: Adapter, head: Head) -> None:
        super().__init__()
        if head.neighbours:
            raise UserError("nearest neighbours cannot be exported: expected a head with weights")
        names = head.taps_read()
        self.head, self.backbone = head.restricted(names), adapter.backbone.model
        self.size = head.hyperparameters.target_size
        # As a graph, which ends with the last tap because nothing asks for what comes after it.
        needed = adapter.backbone.only(names)
        self.reader = TapReader(needed, [self.size], adapter.aggregation, compiled=True)
        self.register_buffer("kept", torch.from_numpy(self.head.kept).to(adapter.device))
        self.register_buffer("weight", torch.from_numpy(self.head.weight).to(adapter.device))
        self.register_buffer("bias", torch.from_numpy(self.head.bias).to(adapter.device))

    kept: Tensor
    weight: Tensor
    bias: Tensor

    def forward(self, images: Tensor) -> Tensor:
        features = torch.cat(self.reader.pooled(images)[self.size], 1)[:, self.kept]
        if not self.head.raw:
            features = unit_norm(features, self.head.layout.of_kept(self.head.kept))
        return features @ self.weight + self.bias


def export_onnx(adapter: Adapter, destination: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Write an adapter as ONNX: pixels in, logits out, for any number of images.

    The names of the classes are in the file's metadata (``classes``, JSON), with ``metadata``.

    Raises UserError where the packages for it are not installed.
    """
    try:
        import_module("onnxscript")
    except ImportError as error:
        raise UserError("ONNX needs two packages more: pip install 'head2toe-ray[onnx]'") from error
    module = PixelsToLogits(adapter)
    side = adapter.preprocessing.image_size
    resized = adapter.preprocessing.resize == "bilinear"
    # No size of the example may be that of another axis, or 1, lest the exporter take them for constants.
    example = (
        torch.randint(0, 256, (2, 3, side + 7 * resized, side + 11 * resized)).float().to(adapter.device)
    )
    batch, height, width = torch.export.Dim("batch"), torch.export.Dim("height"), torch.export.Dim("width")
    axes = {0: batch, 2: height, 3: width} if resized else {0: batch}
    with torch.no_grad():
        program = torch.onnx.export(
            module, (example,), input_names=[INPUT], output_names=[OUTPUT], dynamo=True,
            dynamic_shapes={"pixels": axes}, verbose=False,
        )  # fmt: skip
    assert program is not None
    stated = {"classes": adapter.classes.tolist(), **(metadata or {})}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in stated.items()})
    temporary = f"{destination}.tmp"
    program.save(temporary)
    os.replace(temporary, destination)
