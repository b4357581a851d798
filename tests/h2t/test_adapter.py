import copy
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from safetensors.numpy import load, save
from safetensors.torch import save_file
from scipy.special import softmax

from h2t.adapter import Adapter, WeightType, class_names, convert_head, load_head, save_head
from h2t.backbones.aggregation import Aggregation, Pooling
from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.tap_reader import feature_layout
from h2t.checksum import tensor_digest
from h2t.costs import BackboneCost, HeadSize, storage_bytes
from h2t.errors import UserError
from h2t.extraction import extract_features, preprocessing_for
from h2t.features import FeatureLayout
from h2t.finetuning import (
    FinetuneOptions,
    KeptFeatures,
    TrainableModel,
    embedding_features,
    predict_logits,
    read_metadata,
    save_model,
    train,
)
from h2t.head2toe import Head, fit, logits
from h2t.hyperparameters import Hyperparameters
from h2t.images.source import BadImage, EncodedImage
from h2t.packed import pack, unpack

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
    return [(colours[index % 2] + values).astype(np.uint8) for index, values in enumerate(noise)]


@pytest.fixture(scope="module")
def head(backbone, images):
    features = extract_features(backbone, images, TARGET)
    points = [Hyperparameters("head2toe", TARGET, 0.1, 20, 1e-4, 0.1)]
    layout = feature_layout(backbone, TARGET)
    labels = np.arange(len(images)) % 2
    return next(fit(features, labels, layout, points, n_classes=2, embedding="pre_logits"))


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


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    head = random_head()
    path = tmp_path / "head.safetensors"
    save_head(head, path, provenance={"task": "täsk"}, classes=["a", "b", "c"])
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        loaded, provenance = load_head(source)
        assert provenance == {"task": "täsk"}
        for name, value in vars(head).items():
            np.testing.assert_array_equal(getattr(loaded, name), value)
            assert np.asarray(getattr(loaded, name)).dtype == np.asarray(value).dtype


def test_equal_heads_give_equal_bytes() -> None:
    provenance = {f"key{number}": "value" for number in range(20)}
    backwards = dict(reversed(provenance.items()))
    assert saved(random_head(), 3, provenance) == saved(random_head(), 3, backwards)


def test_the_file_is_plain_safetensors() -> None:
    assert set(load(saved(random_head(), 3))) == {"kept_bitmap", "weight", "bias"}


@pytest.mark.parametrize("format", ["head2toe-head-3", "head2toe-head-4"])
def test_heads_of_earlier_formats_are_read(format: str) -> None:
    head = random_head()
    data = saved(head, 3)
    stored = load(data)
    if format == "head2toe-head-3":
        del stored["kept_bitmap"]
        stored["kept"] = head.kept
    content = read_metadata(data)["head"] | {"format": format, "sha256": tensor_digest(save(stored))}
    loaded, provenance = load_head(save(stored, metadata={"head": json.dumps(content)}))
    assert provenance == {"task": "colours"}
    for name, value in vars(head).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)


def test_kept_features_are_stored_as_the_smaller_of_two(head: Head) -> None:
    few = replace(head, kept=head.kept[:3], weight=head.weight[:3])
    for stored, name in ((few, "kept"), (head, "kept_bitmap")):
        assert set(load(saved(stored))) == {name, "weight", "bias"}
        np.testing.assert_array_equal(load_head(saved(stored))[0].kept, stored.kept)


@pytest.mark.parametrize(("weights", "size"), [("float16", 2), ("int8", 1)])
def test_weights_of_fewer_bytes_are_nearly_the_same(head: Head, weights: WeightType, size: int) -> None:
    small = io.BytesIO()
    convert_head(saved(head), small, weights)
    assert load(small.getvalue())["weight"].nbytes == head.weight.size * size
    loaded, provenance = load_head(small.getvalue())
    assert provenance == {"task": "colours"}
    step = np.abs(head.weight).max(0) / (127 if weights == "int8" else 2**10)
    assert (np.abs(loaded.weight - head.weight) <= 0.51 * step).all()
    with pytest.raises(UserError, match="unknown type of weights 'int4'"):
        convert_head(saved(head), io.BytesIO(), "int4")  # type: ignore[arg-type]


def test_only_what_a_head_reads_is_computed(backbone: Backbone, head: Head, images: list[np.ndarray]) -> None:
    early = backbone.taps[1].name
    inside = head.layout.tap_of(head.kept) <= 1
    head = replace(head, kept=head.kept[inside], weight=head.weight[inside])
    assert set(head.taps_read()) <= {backbone.taps[0].name, early}
    expected = logits(head, extract_features(backbone, images, TARGET))
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, given, returned, name=name: seen.append(name))
        for name, module in backbone.model.named_modules()
    ]
    adapter = Adapter(backbone, head)
    seen.clear()
    found = adapter.predict(images, batch_size=7).probabilities
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(found, softmax(expected, axis=1), rtol=1e-4, atol=1e-6)
    assert not {tap.module for tap in backbone.taps[2:]} & set(seen)


@pytest.mark.filterwarnings("ignore:.*too small for a pooling window")
def test_a_small_head_takes_hardly_more_than_the_cost_model_says() -> None:
    layout = feature_layout(load_backbone("efficientnet_lite0", weights="random", image_size=128), 512)
    random, n_kept = np.random.default_rng(0), int(0.05 * layout.n_features)
    kept = np.sort(random.choice(layout.n_features, n_kept, replace=False))
    weight, bias = (random.normal(size=shape).astype(np.float32) for shape in ((n_kept, 2), 2))
    point = Hyperparameters("head2toe", 512, 0.01, 300, 1e-5, 0.05)
    head = Head(point, 0, kept, layout, weight, bias, 0.0655899941)
    section = CONFIG | {"name": "efficientnet_lite0", "sha256": hashlib.sha256(b"").hexdigest()}
    provenance = {"backbone": json.dumps(section), "task": "solar_cells", "processor": "some CPU, AVX2"}
    size = HeadSize(layout.n_features, n_kept, 2)
    cost = storage_bytes("head2toe", BackboneCost(0, 0, 1280), size)
    assert cost < len(saved(head, 2, provenance)) < 1.05 * cost


def damaged():
    good = saved(random_head(), 3)
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    metadata, tensors = header["__metadata__"], load(good)
    yield "empty", b"", "damaged"
    yield "short", good[:-3], "damaged"
    yield "noise", bytes(range(256)), "damaged"
    yield "another's", save(tensors, metadata={"format": "pt"}), "no metadata of ours"
    yield "other tensors", save({"x": tensors["bias"]}, metadata=metadata), "damaged"
    yield "no metadata", save(tensors), "damaged"
    other = {"head": pack(unpack(metadata["head"]) | {"format": "other"})}
    yield "packed otherwise", save(tensors, metadata={"head": metadata["head"][:-9]}), "no metadata of ours"
    yield "other format", save(tensors, metadata=other), "expected format"
    yield "shapes", save(tensors | {"bias": tensors["bias"][:-1].copy()}, metadata=metadata), "do not match"
    bitmap = tensors.pop("kept_bitmap")
    kept = np.flatnonzero(np.unpackbits(bitmap, bitorder="little")).astype(np.int32)
    yield "order", save(tensors | {"kept": kept[::-1].copy()}, metadata=metadata), "ascending"
    yield "range", save(tensors | {"kept": kept + 16}, metadata=metadata), "ascending"
    yield "bits", save(tensors | {"kept_bitmap": bitmap[:1].copy()}, metadata=metadata), "8 bits for 16"
    tensors["kept"] = kept
    yield (
        "nan",
        save(tensors | {"weight": tensors["weight"] * np.float32(np.nan)}, metadata=metadata),
        "finite",
    )


@pytest.mark.parametrize(("data", "message"), [pytest.param(*rest, id=name) for name, *rest in damaged()])
def test_damaged_heads_are_refused(data, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_head(data)


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(save({"x": np.zeros(2)}))
    for load_file in (load_head, Adapter.load):
        with pytest.raises(
            UserError, match=r"'.*foreign\.safetensors' is not a head.* saved by this package"
        ):
            load_file(path)
        for source in (path.read_bytes(), io.BytesIO(path.read_bytes())):
            with pytest.raises(UserError, match="the given bytes is not a head"):
                load_file(source)


def test_a_missing_file_and_wrong_classes_are_the_users(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.safetensors"):
        load_head(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="2 classes are named, but the head has 3"):
        saved(random_head(), ["a", "b"])


def test_adapter_predicts_what_the_head_does(backbone, images, head) -> None:
    labels, probabilities = Adapter(backbone, head).predict(images)
    expected = logits(head, extract_features(backbone, images, TARGET))
    np.testing.assert_array_equal(labels, expected.argmax(1))
    np.testing.assert_allclose(probabilities, softmax(expected, axis=1), atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert (labels == np.arange(24) % 2).mean() > 0.9


def test_adapter_is_a_module_from_pixels_to_logits(backbone, images, head) -> None:
    adapter = Adapter(backbone, head)
    expected = adapter._logits(images[:1], 50)
    pixels = torch.from_numpy(images[0]).permute(2, 0, 1)[None]
    np.testing.assert_allclose(adapter(pixels).numpy(), expected, atol=1e-5)
    names = set(adapter.state_dict())
    of_head = {"model.heads.0.kept", "model.heads.0.weight", "model.heads.0.bias"}
    assert names == of_head | {f"model.backbone.{name}" for name in backbone.model.state_dict()}
    assert not adapter.training
    assert not any(weight.requires_grad for weight in adapter.parameters())
    twin = copy.deepcopy(adapter)
    with torch.no_grad():
        twin.model.heads[0].bias += 1
    np.testing.assert_allclose(twin._logits(images[:1], 50), expected + 1, atol=1e-5)
    np.testing.assert_array_equal(adapter._logits(images[:1], 50), expected)
    for wrong in (pixels[0], pixels.permute(0, 2, 3, 1)):
        with pytest.raises(UserError, match=r"expected pixels of shape \[n, 3, height, width\], got"):
            adapter(wrong)


def test_gradients_of_an_adapter_reach_pixels_and_the_head(backbone, images, head) -> None:
    adapter = copy.deepcopy(Adapter(backbone, head)).requires_grad_(True)
    pixels = torch.from_numpy(images[0]).permute(2, 0, 1)[None].float().requires_grad_(True)
    logit = adapter(pixels)[0, 1]
    logit.backward()
    direction = pixels.grad / pixels.grad.norm()
    with torch.no_grad():
        ahead, behind = (adapter(pixels + step * direction)[0, 1] for step in (0.5, -0.5))
    assert float(ahead - behind) == pytest.approx(float(pixels.grad.norm()), rel=0.05)
    assert adapter.model.heads[0].bias.grad.tolist() == [0, 1]
    assert (adapter.model.heads[0].weight.grad[:, 1] != 0).any()


@pytest.mark.parametrize("finetuned", [False, True])
def test_threads_share_an_adapter(images, head, finetuned: bool) -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=SIZE)
    features = KeptFeatures(head.kept, head.layout, TARGET)
    model = TrainableModel(backbone, features, 2, options=FinetuneOptions()) if finetuned else head
    adapter = Adapter(backbone, model)
    parts = [images[start : start + 4] for start in range(0, 20, 2)]
    expected = [adapter.predict(part).probabilities for part in parts]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda part: adapter.predict(part, batch_size=2).probabilities, 5 * parts))
    for before, after in zip(5 * expected, found, strict=True):
        np.testing.assert_allclose(after, before, atol=1e-5)


def test_adapter_from_a_file_names_classes_and_reads_files(tmp_path: Path, images, head, backbone) -> None:
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


def test_classes_are_told_without_a_backbone(head) -> None:
    unknown = {"backbone": json.dumps({"name": "nobody's"})}
    assert class_names(saved(head, ["red", "blue"], unknown)) == ["red", "blue"]
    assert class_names(saved(head, 2, unknown)) == ["0", "1"]
    backbone = load_backbone("test_resnet", weights="random", image_size=SIZE)
    features = embedding_features(backbone)
    model = TrainableModel(backbone, features, 2, options=FinetuneOptions())
    for classes, names in ((["red", "blue"], ["red", "blue"]), (2, ["0", "1"])):
        data = save_model(model, features, {"classes": classes})
        assert class_names(data) == names
    for damaged in (b"", data[:-9], data[:-1] + b"x", save({"x": np.zeros(2)})):
        with pytest.raises(UserError, match="the given bytes is not a head or model saved by this package"):
            class_names(damaged)


def test_adapter_refuses_a_backbone_with_other_features(images, head) -> None:
    other = load_backbone("test_resnet", weights="random", image_size=2 * SIZE, taps="with_input")
    with pytest.raises(UserError, match="trained on other features"):
        Adapter(other, head)


def test_a_head_without_its_backbone_says_so(head) -> None:
    with pytest.raises(UserError, match="which backbone"):
        Adapter.load(saved(head))


@pytest.mark.parametrize(("precision", "pooling"), [("float32", "average"), ("bfloat16", "average_std")])
def test_an_adapter_of_a_finetuned_model_predicts_what_the_model_does(
    tmp_path: Path, images, precision: str, pooling: Pooling
) -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=SIZE, seed=3)
    aggregation = Aggregation(pooling=pooling)
    layout = feature_layout(backbone, TARGET, aggregation)
    features = KeptFeatures(np.arange(0, layout.n_features, 5), layout, TARGET)
    options = FinetuneOptions(batch_size=24, precision=precision)
    model = TrainableModel(backbone, features, 2, options=options, aggregation=aggregation)
    preprocessing = preprocessing_for(backbone, normalization="minus_one_to_one")
    arguments = {"learning_rate": 0.05, "steps": 15}
    train(model, images, np.arange(24) % 2, preprocessing, **arguments)
    section = CONFIG | {
        "weights": "auto",
        "sha256": "0" * 64,
        "pooling": pooling,
    }  # neither of these two is asked for: weights are in the file
    path = tmp_path / "model.safetensors"
    path.write_bytes(save_model(model, features, {"backbone": section, "classes": ["red", "blue"]}))
    labels, probabilities = Adapter.load(path).predict(images)
    expected = predict_logits(model, images, preprocessing)
    np.testing.assert_array_equal(probabilities, softmax(expected, axis=1))
    assert labels.tolist() == np.array(["red", "blue"])[expected.argmax(1)].tolist()
    assert (labels == np.array(["red", "blue"])[np.arange(24) % 2]).mean() > 0.9
    with pytest.raises(UserError, match="expected a list of images"):
        Adapter.load(path).predict(str(path))
    with pytest.raises(UserError, match="not a head saved by this package"):
        load_head(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"model\.safetensors' is not .* or is damaged"):
        Adapter.load(path)


def test_a_model_without_its_backbone_says_so() -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=SIZE)
    features = embedding_features(backbone)
    model = TrainableModel(backbone, features, 2, options=FinetuneOptions())
    with pytest.raises(UserError, match="which backbone"):
        Adapter.load(save_model(model, features, {}))


def test_other_weights_than_those_that_a_head_was_trained_on_are_refused(tmp_path: Path, head) -> None:
    path = tmp_path / "mine.safetensors"
    digests = []
    for seed in (3, 4):
        model = load_backbone("test_resnet", weights="random", image_size=SIZE, seed=seed).model
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    section = CONFIG | {"weights": str(path), "sha256": digests[0]}
    data = saved(head, provenance={"backbone": json.dumps(section)})
    with pytest.raises(UserError, match=f"expected sha256 {digests[0]}, got {digests[1]}"):
        Adapter.load(data)


def test_images_of_every_kind(tmp_path: Path, backbone, images, head, encode) -> None:
    adapter, pixels = Adapter(backbone, head), images[0]
    (tmp_path / "a.png").write_bytes(encode(pixels))
    with (tmp_path / "a.png").open("rb") as file:
        kinds = [
            pixels, encode(pixels), io.BytesIO(encode(pixels)), file, tmp_path / "a.png",
            str(tmp_path / "a.png"), PillowImage.fromarray(pixels), EncodedImage(encode(pixels), "a.png"),
        ]  # fmt: skip
        probabilities = adapter.predict(image for image in kinds).probabilities
    np.testing.assert_array_equal(probabilities, np.repeat(probabilities[:1], len(kinds), axis=0))
    for wrong in (None, 7, "a.png", encode(pixels), PillowImage.fromarray(pixels), io.BytesIO(b"")):
        with pytest.raises(UserError, match="expected a list of images, got"):
            adapter.predict(wrong)
    for wrong in (None, torch.zeros(3, 8, 8)):
        with pytest.raises(UserError, match="image 1: expected a path, encoded bytes, an open file"):
            adapter.predict([pixels, wrong])
    with pytest.raises(BadImage, match="the given bytes: not an image"):
        adapter.predict([b"hello"])


@pytest.mark.parametrize("method", ["knn", "all_knn", "head2toe_per_feature", "head2toe_unnormalised"])
def test_heads_of_every_kind_come_back_as_they_were(backbone, images, method: str) -> None:
    features = extract_features(backbone, images, TARGET)
    point = Hyperparameters(method, TARGET, 0.1, 20, 3.0, 0.1)
    layout, labels = feature_layout(backbone, TARGET), np.arange(len(images)) % 2
    (head,) = fit(features, labels, layout, [point], n_classes=2, embedding="pre_logits")
    file = io.BytesIO()
    save_head(head, file, provenance={}, classes=["red", "blue"])
    loaded, _ = load_head(file.getvalue())
    np.testing.assert_array_equal(logits(loaded, features), logits(head, features))
    assert loaded.n_classes == 2
    assert (
        Adapter(backbone, loaded, classes=["red", "blue"]).predict(images).labels[:2] == ["red", "blue"]
    ).all()
