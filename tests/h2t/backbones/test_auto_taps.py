import pytest
import torch
from torch import Tensor, nn

from h2t.backbones import auto_taps
from h2t.backbones.auto_taps import discover_taps
from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.pooling import window
from h2t.backbones.tap import Tap
from h2t.backbones.tap_reader import TapReader, tap_shapes
from h2t.errors import UserError
from tests.h2t.backbones.conftest import FAMILIES, some_images


@pytest.mark.parametrize("name", FAMILIES)
def test_taps_come_in_the_order_in_which_the_network_computes_them(name: str) -> None:
    backbone = load_backbone(name, weights="random", image_size=FAMILIES[name])
    order: list[str] = []
    wanted = {tap.module for tap in backbone.taps if tap.point == "output"}
    for module_name, module in backbone.model.named_modules():
        if module_name in wanted:
            module.register_forward_hook(lambda *_, name=module_name: order.append(name))
    backbone.model(some_images(backbone, 1))
    assert order == [tap.module for tap in backbone.taps if tap.point == "output"]


@pytest.mark.parametrize("name", ["test_convnext", "swin_tiny_patch4_window7_224", "test_maxvit"])
def test_maps_with_channels_last_are_pooled_over_height_and_width(name: str) -> None:
    """A layer norm centres each position over its channels, so a mean over other axes leaves it centred."""
    backbone = load_backbone(name, weights="random", image_size=FAMILIES[name])
    norms = [
        index
        for index, tap in enumerate(backbone.taps)
        if tap.form == "map_channels_last"
        and isinstance(backbone.model.get_submodule(tap.module), nn.LayerNorm)
    ]
    assert norms
    with TapReader(backbone, [2048]) as reader:
        features = reader(some_images(backbone))[2048]
    shapes = list(tap_shapes(backbone).values())
    for index in norms:
        channels, height, _ = shapes[index]
        positions = features[index].reshape(3, -1, channels)
        assert positions.shape[1] == (height // (window(shapes[index], 2048) or height)) ** 2
        torch.testing.assert_close(positions.mean(2), torch.zeros(positions.shape[:2]), rtol=0, atol=1e-5)


class TwiceTheSame(nn.Module):
    """A network that calls its one normalization twice."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(3, 4)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        once = self.act(self.norm(self.conv(images)))
        twice = self.norm(self.conv(once))
        return self.head(twice.mean((2, 3)))


def test_a_module_that_is_called_twice_is_two_taps() -> None:
    torch.manual_seed(0)
    model = TwiceTheSame().eval()
    taps = discover_taps(model, 8)
    assert taps[:2] == (Tap("act", "act", "map"), Tap("norm_call2", "norm", "map", call=1))
    backbone = Backbone("twice", model, taps, 8, (0.5,) * 3, (0.5,) * 3, "pre_logits", "random")
    images = torch.randn(2, 3, 8, 8)
    once = model.norm(model.conv(images)).relu()
    with TapReader(backbone, [3]) as reader:
        for _ in range(2):
            first, second, *_ = reader(images)[3]
            torch.testing.assert_close(first, once.mean((2, 3)))
            torch.testing.assert_close(second, model.norm(model.conv(once)).mean((2, 3)))


class ClassifiesEveryPosition(nn.Module):
    """A network whose classifier is given a map with channels last, as that of timm's Sequencer is."""

    num_classes = 4

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
        self.norm = nn.LayerNorm(5)
        self.head = head

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(images).permute(0, 2, 3, 1))).mean((1, 2))


@pytest.mark.parametrize("head", [nn.Linear(5, 4), nn.Sequential(nn.Identity(), nn.Linear(5, 4))])
def test_a_classifier_of_every_position_reads_channels_last(head: nn.Module) -> None:
    model = ClassifiesEveryPosition(head).eval()
    taps = discover_taps(model, 8)
    assert taps[1] == Tap("pre_logits", "head", "map_channels_last", "input")
    backbone = Backbone("all", model, taps, 8, (0.5,) * 3, (0.5,) * 3, "pre_logits", "random")
    images = some_images(backbone)
    with TapReader(backbone, [5]) as reader:
        norm, embedding, _ = reader(images)[5]
    torch.testing.assert_close(embedding, norm)
    assert embedding.shape == (3, 5)


@pytest.mark.parametrize(
    ("name", "embedding", "others"),
    [
        ("crossvit_tiny_240", "head.1", ["head_0"]),  # 192 wide, the other branch 96
        ("deit_tiny_distilled_patch16_224", "head", ["head_dist"]),
    ],
)
def test_of_several_classifiers_the_widest_reads_the_embedding(
    name: str, embedding: str, others: list[str]
) -> None:
    backbone = load_backbone(name, weights="random")
    assert [tap.name for tap in backbone.taps[-len(others) - 2 :]] == [*others, "pre_logits", "logits"]
    assert backbone.taps[-2].module == embedding
    assert backbone.embedding == "pre_logits"


def test_a_backbone_without_an_embedding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_taps, "_classifier_names", lambda model: frozenset())
    with pytest.raises(UserError, match="test_resnet: its classifier reads nothing that can be tapped"):
        load_backbone("test_resnet", weights="random", image_size=32)
