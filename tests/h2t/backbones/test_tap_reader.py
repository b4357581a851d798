import shutil
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.loading import load_backbone
from h2t.backbones.pooling import pool
from h2t.backbones.tap_reader import TapReader, describe, feature_layout
from h2t.errors import UserError
from tests.h2t.backbones.conftest import FAMILIES, some_images

TARGET_SIZES = (256, 1024)


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


def test_features_are_the_pooled_activations() -> None:
    backbone = load_backbone("efficientnet_lite0", weights="random", image_size=64)
    images = some_images(backbone)
    activations: dict[str, Tensor] = {}
    for tap in backbone.taps[:-2]:
        module = backbone.model.get_submodule(tap.module)
        module.register_forward_hook(
            lambda module, given, returned, name=tap.name: activations.update({name: returned.clone()})
        )
    with TapReader(backbone, (512, 4096)) as reader:
        features = reader(images)
    for size in (512, 4096):
        for tap, pooled in zip(backbone.taps[:-2], features[size][:-2], strict=True):
            torch.testing.assert_close(pooled, pool(activations[tap.name], size))


def test_class_token_of_vit_and_its_treatments() -> None:
    backbone = load_backbone("vitb16", weights="random", image_size=32)
    images = some_images(backbone, 2)
    token = backbone.model.get_parameter("cls_token")[0]
    with TapReader(backbone, [768], Aggregation("only_cls")) as reader:
        alone = reader(images)[768]
    torch.testing.assert_close(alone[0], token.expand(2, -1))
    names = [tap.name for tap in backbone.taps]
    torch.testing.assert_close(alone[names.index("encoded_sequence")], alone[names.index("cls_embedded")])
    torch.testing.assert_close(alone[names.index("cls_embedded")], alone[names.index("pre_logits")])
    widths = feature_layout(backbone, 768, Aggregation("nopool_cls")).widths
    assert widths[:3] == (1536, 1536, 1536)


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224", "mixer_s32_224"])
def test_a_treatment_of_the_class_token_needs_one(name: str) -> None:
    backbone = load_backbone(name, weights="random", image_size=FAMILIES[name])
    for use in (TapReader, describe):
        with pytest.raises(UserError, match=f"{name} has no class token: .*'normal', got 'only_cls'"):
            use(backbone, [512], Aggregation("only_cls"))
    with pytest.raises(UserError, match="has no class token"):
        feature_layout(backbone, 512, Aggregation("nopool_cls"))
    assert hooks_of(backbone.model) == 0


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
        Aggregation("only")  # type: ignore[arg-type]
    assert hooks_of(backbone.model) == 0


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made as ever and run by PyTorch itself."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        ("test_efficientnet", Aggregation(pooling="pyramid")),
        ("test_vit", PAPER),
        ("test_vit", Aggregation(tokens="grid", pooling="average_std")),
        ("resnet18", PAPER),
    ],
)
def test_backbone_with_its_taps_is_one_graph(name: str, aggregation: Aggregation) -> None:
    backbone = load_backbone(name, weights="random", image_size=FAMILIES.get(name))
    torch._dynamo.reset()
    with TapReader(backbone, TARGET_SIZES, aggregation, compiled=True) as reader:
        explained = torch._dynamo.explain(reader.pooled)(some_images(backbone))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.usefixtures("without_compiler")
def test_compiled_reader_reads_the_same_and_is_compiled_once_for_all_batches() -> None:
    backbone = load_backbone("test_efficientnet", weights="random", image_size=64)
    images = torch.randn(7, 3, 64, 64)
    torch._dynamo.utils.counters.clear()
    plain, reader = (TapReader(backbone, TARGET_SIZES, compiled=compiled) for compiled in (False, True))
    with plain, reader:
        for part in (images[:4], images[4:]):
            expected, found = plain(part), reader(part)
            for size in TARGET_SIZES:
                for before, after in zip(expected[size], found[size], strict=True):
                    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_reader_goes_on_where_the_backbone_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: object, inputs: object) -> None:
        raise RuntimeError("no C++ compiler was found\nand much more")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    torch._dynamo.reset()
    backbone = load_backbone("test_efficientnet", weights="random", image_size=64)
    images = torch.randn(2, 3, 64, 64)
    with TapReader(backbone, [256]) as plain, TapReader(backbone, [256], compiled=True) as reader:
        with pytest.warns(UserWarning, match=r"test_efficientnet cannot be compiled .* no C"):
            found = reader(images)
        for before, after in zip(plain(images)[256], found[256], strict=True):
            torch.testing.assert_close(after, before)
        reader(images)  # without another warning


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_by_the_compiler_features_are_the_same() -> None:
    backbone = load_backbone("test_vit", weights="random", image_size=160)
    images = some_images(backbone)
    torch._dynamo.reset()
    with (
        TapReader(backbone, TARGET_SIZES) as plain,
        TapReader(backbone, TARGET_SIZES, compiled=True) as reader,
    ):
        for part in (images, images[:1]):
            expected, found = plain(part), reader(part)
            for size in TARGET_SIZES:
                for before, after in zip(expected[size], found[size], strict=True):
                    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
        assert reader._compiled is not None


@pytest.mark.parametrize(("precision", "rounded"), [("float32", False), ("tf32", True)])
def test_products_are_rounded_where_that_is_asked_for(precision: str, rounded: bool) -> None:
    backbone = load_backbone("test_efficientnet", weights="random", image_size=64, precision=precision)
    seen: list[tuple[bool, bool]] = []
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    backbone.model.register_forward_pre_hook(
        lambda *given: seen.append(tuple(setting.allow_tf32 for setting in settings))
    )
    with TapReader(backbone, [256]) as reader:
        reader(torch.randn(1, 3, 64, 64))
    assert seen == [(rounded, rounded)]
    assert [setting.allow_tf32 for setting in settings] == before


def test_pass_ends_with_the_last_tap_that_is_read() -> None:
    backbone = load_backbone("test_efficientnet", weights="random", image_size=64)
    images = torch.randn(2, 3, 64, 64)
    with TapReader(backbone, [256]) as reader:
        whole = reader(images)[256]
    seen: list[str] = []
    for name, module in backbone.model.named_modules():
        module.register_forward_hook(lambda module, given, returned, name=name: seen.append(name))
    some = replace(backbone, taps=backbone.taps[2:4])
    with TapReader(some, [256]) as reader:
        for _ in range(2):
            for before, after in zip(whole[2:4], reader(images)[256], strict=True):
                torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert backbone.taps[1].module in seen
    assert not {tap.module for tap in backbone.taps[4:]} & set(seen)


def test_readers_of_one_model_and_its_own_passes_leave_each_other_alone() -> None:
    backbone = load_backbone("test_efficientnet", weights="random", image_size=64)
    images = torch.randn(2, 3, 64, 64)
    alone = backbone.model(images)
    first, second = replace(backbone, taps=backbone.taps[:2]), replace(backbone, taps=backbone.taps[1:5])
    with TapReader(first, [256]) as few, TapReader(second, [256]) as more:
        for _ in range(2):
            for a, b in zip(few(images)[256][1:], more(images)[256], strict=False):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
            torch.testing.assert_close(backbone.model(images), alone)
        with pytest.raises(RuntimeError):
            few(torch.randn(2, 5, 64, 64))
        torch.testing.assert_close(backbone.model(images), alone)
