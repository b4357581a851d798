"""An adapter as a file for programs without PyTorch."""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from h2t.adapter import Adapter
from h2t.errors import UserError
from h2t.head2toe import Head

INPUT, OUTPUT = "pixels", "logits"


def export_onnx(adapter: Adapter, destination: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Write an adapter as ONNX: pixels in, logits out, for any number of images.

    The names of the classes are in the file's metadata (``classes``, JSON), with ``metadata``.

    Raises UserError where the packages for it are not installed, and for nearest neighbours.
    """
    if isinstance(adapter.head, Head) and adapter.head.neighbours:
        raise UserError("nearest neighbours cannot be exported: expected a head with weights")
    try:
        import_module("onnxscript")
    except ImportError as error:
        raise UserError("ONNX needs two packages more: pip install 'head2toe-ray[onnx]'") from error
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
            adapter, (example,), input_names=[INPUT], output_names=[OUTPUT], dynamo=True,
            dynamic_shapes={"pixels": axes}, verbose=False,
        )  # fmt: skip
    assert program is not None
    stated = {"classes": adapter.classes.tolist(), **(metadata or {})}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in stated.items()})
    temporary = f"{destination}.tmp"
    program.save(temporary)
    os.replace(temporary, destination)
