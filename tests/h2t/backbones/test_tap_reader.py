import weakref

import pytest
import torch
from torch import Tensor, nn

from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.pooling import pool, window
from h2t.backbones.tap import Tap
from h2t.backbones.tap_reader import TapReader, describe, feature_layout, tap_shapes
from h2t.errors import UserError

# Architecture to image size; None is the model's own.
FAMILIES = {
    "test_resnet": 64,
    "resnetv2_18": 64,
    "test_efficientnet": 64,
    "mobilenetv3_small_050": 64,
    "test_convnext": 64,
    "regnetx_002": 64,
    "densenet121": 64,
    "test_vit": 64,
    "test_vit3": 160,
    "deit_tiny_distilled_patch16_224": 64,
    "swin_tiny_patch4_window7_224": 112,
    "test_maxvit": None,
    "test_coatnet": None,
    "mixer_s32_224": 64,
    "test_mambaout": 64,
    "test_nfnet": 64,
    "test_byobnet": 64,
    "pvt_v2_b0": 64,
    "poolformer_s12": 64,
}
TARGET_SIZES = (256, 1024)


def some_images(backbone: Backbone, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, backbone.image_size, backbone.image_size, generator=generator)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.filterwarnings(
    "ignore:.*too small for a pooling window:UserWarning"
)  # targets are large for such small images
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_contract(name: str) -> None:
    backbone = load_backbone(name, weights="random", image_size=FAMILIES[name])
    before = hooks_of(backbone.model)
    images = some_images(backbone)
    with TapReader(backbone, TARGET_SIZES) as reader:
        together = reader(images)
        one_by_one = [reader(image[None]) for image in images]
    assert hooks_of(backbone.model) == before
    assert len(backbone.taps) > 8
    assert len({tap.name for tap in backbone.taps}) == len(backbone.taps)
    assert [tap.name for tap in backbone.taps[-2:]] == ["pre_logits", "logits"]
    for size in TARGET_SIZES:
        layout = feature_layout(backbone, size)
        assert tuple(tap.shape[1] for tap in together[size]) == layout.widths
        assert layout.taps == tuple(tap.name for tap in backbone.taps)
        for index, features in enumerate(together[size]):
            assert features.dtype == torch.float32
            assert features.isfinite().all()
            apart = torch.cat([single[size][index] for single in one_by_one])
            torch.testing.assert_close(features, apart, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together[256][-1], backbone.model(images), rtol=1e-3, atol=1e-4)


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


def test_features_are_the_pooled_activations() -> None:
    backbone = load_backbone("efficientnet_lite0", weights="random", image_size=64)
    images = some_images(backbone)
    kept: dict[str, Tensor] = {}
    for tap in backbone.taps[:-2]:
        module = backbone.model.get_submodule(tap.module)
        module.register_forward_hook(
            lambda module, given, returned, name=tap.name: kept.update({name: returned.clone()})
        )
    with TapReader(backbone, (512, 4096)) as reader:
        features = reader(images)
    for size in (512, 4096):
        for tap, found in zip(backbone.taps[:-2], features[size][:-2], strict=True):
            torch.testing.assert_close(found, pool(kept[tap.name], size))


def test_before_normalisation_and_activation_are_what_the_layers_make_of_them() -> None:
    found = {}
    for variant in ("auto", "pre_normalization", "pre_activation"):
        backbone = load_backbone("resnet50", weights="random", image_size=64, taps=variant)
        with TapReader(backbone, [64 * 16 * 16]) as reader:  # windows of one position: nothing is averaged
            first = reader(some_images(backbone, 1))[64 * 16 * 16][2]
        found[variant] = first.reshape(16, 16, 64).permute(2, 0, 1)[None]
    norm = backbone.model.get_submodule("stages.0.blocks.0.norm2")
    torch.testing.assert_close(found["auto"], norm(found["pre_normalization"]))
    torch.testing.assert_close(found["auto"], found["pre_activation"].relu())
    assert found["pre_activation"].min() < 0


def test_the_image_itself_can_be_a_tap() -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=64, taps="with_input")
    images = some_images(backbone)
    with TapReader(backbone, [512]) as reader:
        torch.testing.assert_close(reader(images)[512][0], pool(images, 512))


def test_class_token_of_vit_and_its_treatments() -> None:
    backbone = load_backbone("vitb16", weights="random", image_size=32)
    images = some_images(backbone, 2)
    token = backbone.model.get_parameter("cls_token")[0]
    with TapReader(backbone, [768], "only_cls") as reader:
        alone = reader(images)[768]
    torch.testing.assert_close(alone[0], token.expand(2, -1))
    names = [tap.name for tap in backbone.taps]
    torch.testing.assert_close(alone[names.index("encoded_sequence")], alone[names.index("cls_embedded")])
    torch.testing.assert_close(alone[names.index("cls_embedded")], alone[names.index("pre_logits")])
    widths = feature_layout(backbone, 768, "nopool_cls").widths
    assert widths[:3] == (1536, 1536, 1536)


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224", "mixer_s32_224"])
def test_a_treatment_of_the_class_token_needs_one(name: str) -> None:
    backbone = load_backbone(name, weights="random", image_size=FAMILIES[name])
    for use in (TapReader, describe):
        with pytest.raises(UserError, match=f"{name} has no class token: .*'normal', got 'only_cls'"):
            use(backbone, [512], "only_cls")
    with pytest.raises(UserError, match="has no class token"):
        feature_layout(backbone, 512, "nopool_cls")
    assert hooks_of(backbone.model) == 0


class TwiceTheSame(nn.Module):
    """A network that calls its one normalisation twice."""

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
    from h2t.backbones.auto_taps import discover_taps

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
    from h2t.backbones.auto_taps import discover_taps

    model = ClassifiesEveryPosition(head).eval()
    taps = discover_taps(model, 8)
    assert taps[1] == Tap("pre_logits", "head", "map_channels_last", "input")
    backbone = Backbone("all", model, taps, 8, (0.5,) * 3, (0.5,) * 3, "pre_logits", "random")
    images = some_images(backbone)
    with TapReader(backbone, [5]) as reader:
        norm, embedding, _ = reader(images)[5]
    torch.testing.assert_close(embedding, norm)
    assert embedding.shape == (3, 5)


def test_gradients_flow_through_the_taps_when_asked() -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=64)
    backbone.model.requires_grad_(True)
    images = some_images(backbone)
    with TapReader(backbone, TARGET_SIZES, gradients=True) as reader:
        with_gradients = reader(images)
        sum(features.square().sum() for features in with_gradients[256]).backward()
    assert all(parameter.grad is not None for parameter in backbone.model.parameters())
    with TapReader(backbone, TARGET_SIZES) as reader:
        without = reader(images)
    for a, b in zip(with_gradients[1024], without[1024], strict=True):
        torch.testing.assert_close(a.detach(), b)
        assert a.requires_grad
        assert not b.requires_grad


def test_gradients_are_those_of_finite_differences() -> None:
    backbone = load_backbone("test_byobnet", weights="random", image_size=32)
    images = some_images(backbone, 1).requires_grad_()
    with TapReader(backbone, [64], gradients=True) as reader:

        def total(batch: Tensor) -> Tensor:
            return torch.cat(reader(batch)[64], dim=1).sum()

        (gradient,) = torch.autograd.grad(total(images), images)
        direction = gradient / gradient.norm()
        step = 1e-2
        slope = (total(images + step * direction) - total(images - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, gradient.norm(), rtol=2e-2, atol=0)


def test_no_activation_outlives_its_hook() -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=64)
    alive: list[int] = []
    seen: list[weakref.ref] = []

    def count(module: nn.Module, given: tuple, returned: Tensor) -> None:
        seen.append(weakref.ref(returned.untyped_storage()))
        alive.append(sum(reference() is not None for reference in seen))

    with TapReader(backbone, TARGET_SIZES) as reader:
        for tap in backbone.taps[:-2]:
            backbone.model.get_submodule(tap.module).register_forward_hook(count)
        reader(some_images(backbone))
    assert len(alive) > 10
    assert max(alive) <= 5


def test_bfloat16_features_are_float32_and_close() -> None:
    exact, rough = (
        load_backbone("test_efficientnet", weights="random", image_size=64, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    images = some_images(exact)
    with TapReader(exact, [256]) as reader, TapReader(rough, [256]) as rough_reader:
        for a, b in zip(reader(images)[256], rough_reader(images)[256], strict=True):
            assert b.dtype == torch.float32
            assert torch.cosine_similarity(a, b).min() > 0.98


def test_a_tap_too_small_for_the_target_is_named_in_a_warning() -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=64)
    with pytest.warns(UserWarning, match=r"test_resnet at target size 4096: \d+ of 20 taps"):
        layout = feature_layout(backbone, 4096)
    assert layout.widths[layout.taps.index("layer4_0_act2")] == 96


def test_rows_describe_the_taps() -> None:
    rows = describe(
        load_backbone("resnet50", weights="random", taps="pre_activation", image_size=64), [64, 512]
    )
    assert rows[1].tap == "block1_unit1_layer0"
    assert rows[1].module == "stages.0.blocks.0.norm1.act (input)"
    assert rows[1].shape == (64, 16, 16)
    assert rows[1].features == {64: 64, 512: 256}


def test_impossible_settings_are_refused() -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=64)
    with pytest.raises(UserError, match="target size -1: expected a whole number from 1"):
        TapReader(backbone, [-1])
    with pytest.raises(UserError, match="unknown treatment of the class token 'only': did you mean only_cls"):
        TapReader(backbone, [512], "only")  # type: ignore[arg-type]
    assert hooks_of(backbone.model) == 0
