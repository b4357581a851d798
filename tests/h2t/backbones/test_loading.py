import pytest
import torch

from h2t.backbones.loading import Backbone, load_backbone
from h2t.device import default_device
from h2t.errors import UserError

TINY = "test_efficientnet"


def test_a_loaded_backbone_is_frozen_and_says_what_it_loaded(lite0: Backbone) -> None:
    assert not lite0.model.training
    assert not any(parameter.requires_grad for parameter in lite0.model.parameters())
    assert lite0.weights.startswith("efficientnet-lite0-57934424.pth, sha256 5793442")
    assert lite0.image_size == 224
    assert lite0.embedding == "pre_logits"
    assert lite0.mean == lite0.std == (0.5, 0.5, 0.5)


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (load_backbone(TINY, weights="random").model.state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = load_backbone(TINY, weights="random", seed=1).model.state_dict()
    assert not torch.equal(first["conv_stem.weight"], other["conv_stem.weight"])


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


def test_the_default_device_holds_a_tensor() -> None:
    assert torch.zeros(1, device=default_device()).is_cuda == torch.cuda.is_available()
