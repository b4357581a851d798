from functools import cache

import pytest
import torch

from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.pooling import pool
from h2t.backbones.tap_reader import TapReader, describe
from tests.h2t.backbones.conftest import some_images

# What VTAB's published shapes give for the official taps and target sizes.
TOTALS = {
    ("resnet50", "auto"): (52, {512: 30_440, 8_192: 406_248, 24_576: 1_688_808}),
    ("resnet50", "figure6"): (20, {2_048: 29_800}),
    ("vitb16", "auto"): (53, {768: 68_352, 15_360: 814_848, 32_448: 1_837_824}),
    ("vitb16", "appendix_c"): (51, {768: 67_048, 15_360: 782_824, 32_448: 1_762_792}),
}


@cache
def preset(name: str, variant: str = "auto") -> Backbone:
    return load_backbone(name, weights="random", taps=variant)


def test_lite0_has_every_normalization_then_the_embedding_and_the_logits() -> None:
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
    outputs, normalization, activation, pooled_input = (
        preset("resnet50", variant).taps
        for variant in ("auto", "pre_normalization", "pre_activation", "with_input")
    )
    assert (
        [tap.name for tap in normalization]
        == [tap.name for tap in activation]
        == [tap.name for tap in outputs]
    )
    assert sum(tap.point == "input" for tap in normalization) == 49
    assert {tap.module for tap in activation if tap.point == "input"} >= {
        "norm.act",
        "stages.0.blocks.0.norm1.act",
    }
    assert pooled_input[0].name == "input"
    assert pooled_input[1:] == outputs


def test_before_normalization_and_activation_are_what_the_layers_make_of_them() -> None:
    first_norm = {}
    for variant in ("auto", "pre_normalization", "pre_activation"):
        backbone = load_backbone("resnet50", weights="random", image_size=64, taps=variant)
        with TapReader(backbone, [64 * 16 * 16]) as reader:  # windows of one position: nothing is averaged
            first = reader(some_images(backbone, 1))[64 * 16 * 16][2]
        first_norm[variant] = first.reshape(16, 16, 64).permute(2, 0, 1)[None]
    norm = backbone.model.get_submodule("stages.0.blocks.0.norm2")
    torch.testing.assert_close(first_norm["auto"], norm(first_norm["pre_normalization"]))
    torch.testing.assert_close(first_norm["auto"], first_norm["pre_activation"].relu())
    assert first_norm["pre_activation"].min() < 0


def test_the_image_itself_can_be_a_tap() -> None:
    backbone = load_backbone("test_resnet", weights="random", image_size=64, taps="with_input")
    images = some_images(backbone)
    with TapReader(backbone, [512]) as reader:
        torch.testing.assert_close(reader(images)[512][0], pool(images, 512))
