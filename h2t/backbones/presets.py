"""Backbones with names of ours: the paper's two, their taps (Appendix C) and variants (Tables 6 and 7)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from h2t.backbones.tap import Tap
from h2t.errors import unknown


@dataclass(frozen=True)
class Preset:
    """A backbone under a name of ours: timm's name, the image size in pixels, the taps (None: automatic)."""

    timm_name: str
    image_size: int
    taps: tuple[Tap, ...] | None = None
    variants: tuple[str, ...] = ()


INPUT = Tap("input", "", "map", "input")
LOGITS = Tap("logits", "", "vector")
RESNET50_DEPTHS = (3, 4, 6, 3)
VITB16_DEPTH = 12


def _resnet50() -> tuple[Tap, ...]:
    units = [
        Tap(
            f"block{stage + 1}_unit{unit + 1}_layer{layer}",
            f"stages.{stage}.blocks.{unit}.norm{layer + 1}",
            "map",
        )
        for stage, depth in enumerate(RESNET50_DEPTHS)
        for unit in range(depth)
        for layer in range(3)
    ]
    ends = (
        Tap("pre_logits_pre_pooling", "norm", "map"),
        Tap("pre_logits", "head.global_pool", "vector"),
        LOGITS,
    )
    return (Tap("after_root", "stem", "map"), *units, *ends)


def _vitb16() -> tuple[Tap, ...]:
    parts = (("pre_attn", "norm1"), ("attn", "attn"), ("mlp_1", "mlp.act"), ("mlp_2", "mlp.fc2"))
    encoder = [
        Tap(f"encoder_{block}_{name}", f"blocks.{block}.{module}", "tokens")
        for block in range(VITB16_DEPTH)
        for name, module in parts
    ]
    return (
        Tap("root_output_with_cls", "patch_embed", "tokens", prepend="cls_token"),
        Tap("position_embedded_input", "pos_drop", "tokens"),
        *encoder,
        Tap("encoded_sequence", "norm", "tokens"),
        Tap("cls_embedded", "norm", "first_token"),
        Tap("pre_logits", "head_drop", "vector"),
    )


PRESETS: dict[str, Preset] = {
    "efficientnet_lite0": Preset("tf_efficientnet_lite0", 224),
    "resnet50": Preset("resnetv2_50.a1h_in1k", 240, _resnet50(), ("paper", "figure6")),
    "vitb16": Preset("vit_base_patch16_224.augreg_in1k", 224, _vitb16(), ("paper", "appendix_c")),
}


def name_in_timm(name: str) -> str:
    """The name in timm of a preset, or of any timm model, with a weights tag or not.

    Raises UserError for a name that neither knows.
    """
    if name in PRESETS:
        return PRESETS[name].timm_name
    from timm import is_model, list_models, list_pretrained  # takes seconds; presets have no use for it

    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        raise unknown("backbone", name, [*PRESETS, *list_models(f"{architecture[:4]}*")][:40])
    tags = [full.partition(".")[2] for full in list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise unknown(f"weights tag of {architecture}", tag, tags)
    return name


def figure6(taps: tuple[Tap, ...]) -> tuple[Tap, ...]:
    """The 20 taps of Figure 6: root, first layer of each unit, and the end; N = 29,800 at T = 2,048."""
    return tuple(tap for tap in taps if not tap.name.endswith(("_layer1", "_layer2")))


def appendix_c(taps: tuple[Tap, ...]) -> tuple[Tap, ...]:
    """The 51 taps that the text of Appendix C names for ViT, where the official configuration has 53."""
    dropped = ("root_output_with_cls", "encoded_sequence", "cls_embedded")
    return (*(tap for tap in taps if tap.name not in dropped), LOGITS)


def with_input(taps: tuple[Tap, ...]) -> tuple[Tap, ...]:
    """The taps and the pooled image itself (Table 6, "Adding Pooled Input")."""
    return (INPUT, *taps)


def pre_normalization(taps: tuple[Tap, ...], fused: frozenset[str]) -> tuple[Tap, ...]:
    """The taps with what each normalization is given in place of what it returns (Table 6).

    ``fused``: the modules that normalize and activate; taps elsewhere stay.
    """
    return tuple(replace(tap, point="input") if tap.module in fused else tap for tap in taps)


def pre_activation(taps: tuple[Tap, ...], fused: frozenset[str]) -> tuple[Tap, ...]:
    """The taps with each normalized activation as it is before its activation function (Table 6)."""
    return tuple(
        replace(tap, module=f"{tap.module}.act", point="input") if tap.module in fused else tap
        for tap in taps
    )


PRESET_VARIANTS: dict[str, Callable[[tuple[Tap, ...]], tuple[Tap, ...]]] = {
    "paper": tuple,
    "figure6": figure6,
    "appendix_c": appendix_c,
}
FUSED_VARIANTS = {"pre_normalization": pre_normalization, "pre_activation": pre_activation}
