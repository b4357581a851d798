"""Adapters as modules from pixels to logits, and as ONNX."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from h2t.adapter import Adapter
from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.tap_reader import feature_layout
from h2t.errors import UserError
from h2t.export import export_onnx
from h2t.extraction import extract_features, preprocessing_for
from h2t.finetuning import FinetuneOptions, TrainableModel, embedding_features
from h2t.head2toe import fit
from h2t.hyperparameters import Hyperparameters
from h2t.images.preprocessing import Resize

TARGET = 32
pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter, about itself


def images(side: int, n: int = 12) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, side, side + 4, 3), np.uint8))


def adapter(
    backbone: Backbone,
    method: str = "head2toe",
    resize: Resize = "bilinear",
    aggregation: Aggregation = PAPER,
    target: int = TARGET,
) -> Adapter:
    """Of two classes that mean nothing."""
    preprocessing = preprocessing_for(backbone, resize)
    features = extract_features(
        backbone, images(40), target, preprocessing=preprocessing, aggregation=aggregation
    )
    point = Hyperparameters(method, target, 0.1, 20, 1e-4, 0.1)
    layout = feature_layout(backbone, target, aggregation)
    (head,) = fit(features, np.arange(12) % 2, layout, [point], n_classes=2,
                  embedding=backbone.embedding)  # fmt: skip
    return Adapter(
        backbone, head, classes=["red", "blue"], preprocessing=preprocessing, aggregation=aggregation
    )


@pytest.mark.parametrize(
    ("name", "size", "aggregation", "target"),
    [
        ("test_resnet", 48, PAPER, TARGET),
        pytest.param("test_vit", 160, PAPER, TARGET, marks=pytest.mark.slow),
        pytest.param("test_resnet", 48, Aggregation(pooling="average_max"), 256, marks=pytest.mark.slow),
        pytest.param("test_resnet", 56, Aggregation(pooling="pyramid"), 512, marks=pytest.mark.slow),
        pytest.param(
            "test_vit", 160, Aggregation(tokens="grid", pooling="average_std"), 256, marks=pytest.mark.slow
        ),
    ],
)
def test_onnx_gives_the_same_logits_for_any_number_and_size_of_images(
    name: str, size: int, aggregation: Aggregation, target: int, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    made = adapter(
        load_backbone(name, weights="random", image_size=size), aggregation=aggregation, target=target
    )
    export_onnx(made, tmp_path / "a.onnx", {"task": "colours"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata == {"classes": '["red", "blue"]', "task": '"colours"'}
    for n, side in ((5, 28), (1, 90), (3, size)):
        pixels = images(side, n)
        expected = made._logits(pixels, 50)
        batch = np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32)
        (found,) = session.run(None, {"pixels": batch})
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_modules_give_the_logits_of_fine_tuned_networks_and_of_resized_images() -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=48)
    tuned = load_backbone("test_resnet", weights="random", image_size=48)
    model = TrainableModel(tuned, embedding_features(tuned), 3, options=FinetuneOptions())
    for made in (adapter(backbone, resize="bicubic"), Adapter(tuned, model)):
        pixels = images(40, 3)
        expected = made._logits(pixels, 50)
        if made.preprocessing.resize == "bicubic":
            opened = [Image.fromarray(image) for image in pixels]
            pixels = [np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)) for image in opened]
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            np.testing.assert_allclose(made(batch).numpy(), expected, rtol=1e-3, atol=1e-3)


def test_neighbours_are_refused(tmp_path: Path) -> None:
    made = adapter(load_backbone("test_resnet", weights="random", image_size=48), "knn")
    with pytest.raises(UserError, match="nearest neighbours cannot be exported"):
        export_onnx(made, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
