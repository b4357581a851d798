import io
import json

import numpy as np
import pytest
from PIL import Image as PillowImage
from safetensors.numpy import load, save

from h2t.adapter import Adapter, load_head, save_head
from h2t.backbones.loading import load_backbone
from h2t.backbones.tap_reader import feature_layout
from h2t.errors import UserError
from h2t.extraction import extract_features
from h2t.features import FeatureLayout
from h2t.head2toe import Head, fit, predict
from h2t.hyperparameters import Hyperparameters

SIZE, TARGET = 48, 32
CONFIG = {"name": "test_resnet", "weights": "random", "image_size": SIZE, "normalization": "minus_one_to_one"}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("test_resnet", weights="random", image_size=SIZE)


@pytest.fixture(scope="module")
def images():
    """Two classes that differ in colour, 24 images of different sizes."""
    random = np.random.default_rng(0)
    colours = np.array([[200, 40, 40], [40, 40, 200]])
    sides = random.integers(30, 60, 24)
    noise = [random.integers(-30, 30, (side, side + 5, 3)) for side in sides]
    return [(colours[place % 2] + each).astype(np.uint8) for place, each in enumerate(noise)]


@pytest.fixture(scope="module")
def head(backbone, images):
    features = extract_features(backbone, images, TARGET)
    settings = [Hyperparameters("head2toe", TARGET, 0.1, 20, 1e-4, 0.1)]
    layout = feature_layout(backbone, TARGET)
    labels = np.arange(len(images)) % 2
    return next(fit(features, labels, layout, settings, n_classes=2, embedding="pre_logits"))


def saved(head, classes=2, provenance=None):
    sink = io.BytesIO()
    save_head(head, sink, provenance=provenance or {"task": "colours"}, classes=classes)
    return sink.getvalue()


def random_head(n_kept=5, n_classes=3):
    random = np.random.default_rng(1)
    layout = FeatureLayout(("a", "b"), (7, 9))
    kept = np.sort(random.choice(16, n_kept, replace=False))
    weight = random.normal(size=(n_classes, n_kept)).astype(np.float32).T  # not contiguous, as heads come
    return Head(
        Hyperparameters("head2toe", 64, 0.01, 500, 1e-5, 0.3),
        2,
        kept,
        layout,
        weight,
        np.zeros(3, np.float32),
        0.25,
    )


def test_what_is_saved_comes_back(tmp_path):
    head = random_head()
    path = tmp_path / "head.safetensors"
    save_head(head, path, provenance={"task": "täsk"}, classes=["a", "b", "c"])
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        found, provenance = load_head(source)
        assert provenance == {"task": "täsk"}
        assert (found.settings, found.seed, found.layout) == (head.settings, head.seed, head.layout)
        assert found.train_loss == head.train_loss
        for name in ("kept", "weight", "bias"):
            np.testing.assert_array_equal(getattr(found, name), getattr(head, name))
            assert getattr(found, name).dtype == getattr(head, name).dtype


def test_equal_heads_give_equal_bytes():
    provenance = {f"key{number}": "value" for number in range(20)}
    backwards = dict(reversed(provenance.items()))
    assert saved(random_head(), 3, provenance) == saved(random_head(), 3, backwards)


def test_the_file_is_plain_safetensors():
    assert set(load(saved(random_head(), 3))) == {"kept", "weight", "bias"}


def damaged():
    good = saved(random_head(), 3)
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    metadata, tensors = header["__metadata__"], load(good)
    yield "empty", b"", "damaged"
    yield "short", good[:-3], "damaged"
    yield "noise", bytes(range(256)), "damaged"
    yield "other tensors", save({"x": tensors["bias"]}, metadata=metadata), "damaged"
    yield "no metadata", save(tensors), "damaged"
    other = {"head": json.dumps(json.loads(metadata["head"]) | {"format": "other"})}
    yield "other format", save(tensors, metadata=other), "expected format"
    yield "shapes", save(tensors | {"bias": tensors["bias"][:-1].copy()}, metadata=metadata), "do not match"
    yield "order", save(tensors | {"kept": tensors["kept"][::-1].copy()}, metadata=metadata), "ascending"
    yield "range", save(tensors | {"kept": tensors["kept"] + 16}, metadata=metadata), "ascending"
    yield (
        "nan",
        save(tensors | {"weight": tensors["weight"] * np.float32(np.nan)}, metadata=metadata),
        "finite",
    )


@pytest.mark.parametrize(("data", "message"), [pytest.param(*rest, id=name) for name, *rest in damaged()])
def test_damaged_heads_are_refused(data, message):
    with pytest.raises(UserError, match=message):
        load_head(data)


def test_a_missing_file_and_wrong_classes_are_the_users(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.safetensors"):
        load_head(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="2 classes are named, but the head has 3"):
        saved(random_head(), ["a", "b"])


def test_features_are_the_same_whatever_the_batch(backbone, images):
    whole = extract_features(backbone, images, TARGET)
    np.testing.assert_allclose(extract_features(backbone, images, TARGET, batch_size=5), whole, atol=1e-5)
    assert whole.shape == (24, feature_layout(backbone, TARGET).n_features)


def test_adapter_predicts_what_the_head_does(backbone, images, head):
    labels, probabilities = Adapter(backbone, head).predict(images)
    logits = predict(head, extract_features(backbone, images, TARGET))
    np.testing.assert_array_equal(labels, logits.argmax(1))
    np.testing.assert_allclose(
        np.log(probabilities[:, 1] / probabilities[:, 0]), logits[:, 1] - logits[:, 0], atol=1e-4
    )
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert (labels == np.arange(24) % 2).mean() > 0.9


def test_adapter_from_a_file_names_classes_and_reads_files(tmp_path, images, head, backbone):
    path = tmp_path / "image.png"
    PillowImage.fromarray(images[1]).save(path)
    adapter = Adapter.load(saved(head, ["red", "blue"], {"backbone": json.dumps(CONFIG)}))
    assert adapter.preprocessing.mean == (0.5, 0.5, 0.5)
    from_file, from_array = adapter.predict([path]), adapter.predict([images[1]])
    assert from_file.labels.tolist() == from_array.labels.tolist() == ["blue"]
    np.testing.assert_array_equal(from_file.probabilities, from_array.probabilities)
    with pytest.raises(UserError, match=r"nothing\.png"):
        adapter.predict([tmp_path / "nothing.png"])
    with pytest.raises(UserError, match="expected a list of images"):
        adapter.predict(str(path))


def test_adapter_refuses_a_backbone_with_other_features(images, head):
    other = load_backbone("test_resnet", weights="random", image_size=2 * SIZE, taps="with_input")
    with pytest.raises(UserError, match="trained on other features"):
        Adapter(other, head)


def test_a_head_without_its_backbone_says_so(head):
    with pytest.raises(UserError, match="which backbone"):
        Adapter.load(saved(head))
