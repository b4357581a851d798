"""The training of a backbone with its head: what it must compute, however it is cut or interrupted."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.tap_reader import TapReader, feature_layout
from h2t.errors import UserError
from h2t.features import keep_features
from h2t.finetuning import (
    Checkpoints,
    FinetuneOptions,
    KeptFeatures,
    OutOfMemory,
    TrainableModel,
    Training,
    embedding_features,
    load_model,
    model_content,
    predict_logits,
    save_model,
    train,
)
from h2t.images.preprocessing import Preprocessing, to_batch

LABELS = np.arange(24) % 2
PREPROCESSING = Preprocessing(32)
OPTIONS = FinetuneOptions(batch_size=10)
SEVEN_STEPS = {"learning_rate": 0.1, "steps": 7}


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Two classes told apart by their brightness."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 120, (20, 24, 3), np.uint8) + np.uint8(100 * label) for label in LABELS]


def small_backbone(seed: int = 0) -> Backbone:
    return load_backbone("test_efficientnet", weights="random", image_size=32, seed=seed)


def every_seventh(backbone: Backbone) -> KeptFeatures:
    layout = feature_layout(backbone, 16)
    return KeptFeatures(np.arange(0, layout.n_features, 7), layout, 16)


FEATURES = {"embedding": embedding_features, "kept": every_seventh}


def new_model(
    features: str = "embedding", options: FinetuneOptions = OPTIONS, backbone_seed: int = 0, seed: int = 0
) -> TrainableModel:
    backbone = small_backbone(backbone_seed)
    return TrainableModel(backbone, FEATURES[features](backbone), 2, options=options, seed=seed)


def trained(
    images: list[np.ndarray], model: TrainableModel, checkpoints: Checkpoints | None = None
) -> Training:
    return train(model, images, LABELS, PREPROCESSING, checkpoints=checkpoints, **SEVEN_STEPS)


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("features", FEATURES)
def test_a_model_reads_the_features_that_the_frozen_methods_read(
    images: list[np.ndarray], features: str
) -> None:
    backbone = small_backbone()
    read = FEATURES[features](backbone)
    model = TrainableModel(backbone, read, 2, options=OPTIONS).eval()
    reference = small_backbone()
    with TapReader(reference, [read.target_size]) as reader:
        values = reader(to_batch(images, PREPROCESSING))[read.target_size]
    taps = dict(zip(feature_layout(reference, read.target_size).taps, values, strict=True))
    raw = torch.cat([taps[name] for name in read.layout.taps], 1).numpy()
    kept = keep_features(raw, read.layout, read.kept)
    weight, bias = (tensor.detach().numpy() for tensor in (model.head.weight, model.head.bias))
    np.testing.assert_allclose(
        predict_logits(model, images, PREPROCESSING), kept @ weight.T + bias, atol=1e-6
    )


def test_training_is_that_of_a_plain_loop(images: list[np.ndarray]) -> None:
    model = new_model()
    losses = trained(images, model).losses
    backbone = small_backbone()
    network = backbone.model.requires_grad_(True).train()
    network.reset_classifier(0)
    head = new_model().head
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for step in range(7):
        rows = np.arange(24)[step % 3 * 10 : step % 3 * 10 + 10]
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 7))
        features = nn.functional.normalize(network(to_batch([images[row] for row in rows], PREPROCESSING)))
        loss = nn.functional.cross_entropy(head(features), torch.from_numpy(LABELS[rows]), reduction="sum")
        optimizer.zero_grad()
        (loss / 10).backward()
        optimizer.step()
        assert losses[step] == pytest.approx(float(loss.detach()) / len(rows), abs=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("features", FEATURES)
def test_gradients_reach_the_backbone_and_only_used_taps_count(
    images: list[np.ndarray], features: str
) -> None:
    model = new_model(features)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trained(images, model)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {"backbone.conv_stem.weight", "head.weight", "head.bias"} <= changed
    assert all(width > 0 for width in model.layout.widths)


@pytest.mark.parametrize("features", FEATURES)
def test_a_training_that_is_cut_off_goes_on_to_the_same_weights(
    images: list[np.ndarray], features: str
) -> None:
    options = replace(OPTIONS, checkpoint_every=2)
    uninterrupted, saved = new_model(features, options), bytearray()
    losses = trained(images, uninterrupted).losses

    class CutOff(Exception):
        pass

    def save_and_stop(data: bytes) -> None:
        if saved:
            raise CutOff
        saved.extend(data)

    with pytest.raises(CutOff):
        trained(images, new_model(features, options), Checkpoints(lambda: None, save_and_stop))
    resumed = new_model(features, options, backbone_seed=5, seed=5)
    spent = save({**load(bytes(saved)), "seconds": torch.tensor(1000.0)})
    again = trained(images, resumed, Checkpoints(lambda: spent, lambda data: None))
    np.testing.assert_array_equal(again.losses, losses)
    assert largest_difference(resumed, uninterrupted) == 0
    assert 1000 < again.seconds < 1100


@pytest.mark.parametrize("features", FEATURES)
def test_a_batch_in_parts_gives_the_same_weights(images: list[np.ndarray], features: str) -> None:
    frozen = replace(OPTIONS, batch_norm="frozen")
    at_once = new_model(features, frozen)
    parts = new_model(features, replace(frozen, gradient_accumulation=3))
    np.testing.assert_allclose(trained(images, parts).losses, trained(images, at_once).losses, atol=1e-5)
    assert largest_difference(parts, at_once) < 1e-5


@pytest.mark.parametrize(("name", "size"), [("test_vit", 160), ("test_resnet", 32)])
def test_gradient_checkpointing_gives_the_same_weights(
    images: list[np.ndarray], name: str, size: int
) -> None:
    """Running statistics too: batch norm must not count what is computed again."""

    def model_of(checkpointing: bool) -> TrainableModel:
        backbone = load_backbone(name, weights="random", image_size=size)
        options = replace(OPTIONS, gradient_checkpointing=checkpointing)
        return TrainableModel(backbone, embedding_features(backbone), 2, options=options)

    plain, checkpointed = model_of(False), model_of(True)
    settings = {"learning_rate": 0.1, "steps": 2}
    for model in (plain, checkpointed):
        train(model, images[:10], LABELS[:10], Preprocessing(size), **settings)
    counters = {key: value for key, value in checkpointed.state_dict().items() if "num_batches" in key}
    plain.load_state_dict(counters, strict=False)
    assert largest_difference(plain, checkpointed) < 1e-5


def test_gradient_checkpointing_is_refused_where_it_can_not_be_had() -> None:
    options = replace(OPTIONS, gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"features are read inside .*gradient_accumulation instead"):
        new_model("kept", options)
    backbone = load_backbone("dla46x_c", weights="random", image_size=64)
    with pytest.raises(UserError, match="dla46x_c does not offer it"):
        TrainableModel(backbone, embedding_features(backbone), 2, options=options)


def test_lower_precision_learns_as_well(images: list[np.ndarray]) -> None:
    model = new_model(options=replace(OPTIONS, precision="bfloat16"))
    losses = trained(images, model).losses
    exact = trained(images, new_model()).losses
    assert not np.array_equal(losses, exact)
    np.testing.assert_allclose(losses[:5], exact[:5], atol=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_frozen_batch_norm_keeps_its_statistics(images: list[np.ndarray]) -> None:
    def statistics(options: FinetuneOptions) -> torch.Tensor:
        model = new_model(options=options)
        trained(images, model)
        return model.backbone.bn1.running_mean

    before = small_backbone().model.bn1.running_mean
    assert torch.equal(statistics(replace(OPTIONS, batch_norm="frozen")), before)
    assert not torch.equal(statistics(OPTIONS), before)


def test_the_seed_draws_the_head_and_random_weights() -> None:
    assert torch.equal(new_model(seed=1).head.weight, new_model(seed=1).head.weight)
    assert not torch.equal(new_model(seed=1).head.weight, new_model(seed=2).head.weight)
    assert not torch.equal(small_backbone(1).model.conv_stem.weight, small_backbone(2).model.conv_stem.weight)


@pytest.mark.parametrize("features", FEATURES)
def test_a_saved_model_predicts_the_same(images: list[np.ndarray], features: str) -> None:
    model = new_model(features)
    trained(images, model)
    data = save_model(model, FEATURES[features](small_backbone()), {"task": "first"})
    loaded, content = load_model(data, small_backbone(7), OPTIONS)
    logits = predict_logits(model, images, PREPROCESSING)
    np.testing.assert_array_equal(predict_logits(loaded, images, PREPROCESSING), logits)
    np.testing.assert_allclose(predict_logits(loaded, images, PREPROCESSING, batch_size=5), logits, atol=1e-5)
    assert content == model_content(data) == {"task": "first"}


def test_a_loss_that_is_not_finite_ends_the_training_with_its_step(images: list[np.ndarray]) -> None:
    result = train(new_model(), images, LABELS, PREPROCESSING, learning_rate=1e30, steps=60)
    assert result.diverged_at == len(result.losses) <= 50
    np.testing.assert_array_equal(np.isfinite(result.losses), [True] * (len(result.losses) - 1) + [False])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
@pytest.mark.parametrize("part", ["forward", "update"])
def test_too_large_a_batch_says_its_size(
    images: list[np.ndarray], error: Exception, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    model = new_model()
    monkeypatch.setattr(*((model.head, "forward") if part == "forward" else (torch.optim.SGD, "step")), fail)
    with pytest.raises(OutOfMemory, match=r"a batch of 10 images .*gradient_accumulation 1"):
        trained(images, model)


def test_too_many_images_to_predict_are_told_from_that(
    images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    model = new_model()
    monkeypatch.setattr(model.head, "forward", fail)
    with pytest.raises(OutOfMemory, match="predicting 5 images at once does not fit in memory"):
        predict_logits(model, images, PREPROCESSING, batch_size=5)


def test_only_running_out_of_memory_is_called_so(
    images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model()
    monkeypatch.setattr(model.head, "forward", lambda _: torch.empty(2**55))
    with pytest.raises(OutOfMemory):
        trained(images, model)
    monkeypatch.setattr(model.head, "forward", lambda _: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        trained(images, model)


def test_weights_of_another_architecture_are_refused() -> None:
    model = new_model()
    data = save_model(model, embedding_features(small_backbone()), {})
    other = load_backbone("test_resnet", weights="random", image_size=32)
    tap = replace(other.taps[-2], name="pre_logits")
    with pytest.raises(ValueError, match="the weights do not fit test_resnet"):
        load_model(data, replace(other, taps=(tap,)), OPTIONS)
