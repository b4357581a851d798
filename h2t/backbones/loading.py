"""A frozen timm model with its image size, the normalisation of its input, and its ordered taps."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from h2t.backbones.auto_taps import discover_taps, fused_modules
from h2t.backbones.presets import FUSED_VARIANTS, PRESET_VARIANTS, PRESETS, Preset, with_input
from h2t.backbones.pretrained import find_weights, is_shipped_form, read_state_dict, timm_names
from h2t.backbones.tap import Tap
from h2t.errors import UserError, unknown

__all__ = ["Backbone", "Tap", "load_backbone", "preset_names"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANDOM_SEED = 0


@dataclass
class Backbone:
    """A model in evaluation mode without gradients, and what is needed to feed and to tap it.

    ``image_size``: pixels a side; ``mean``, ``std``: of its input, per channel, for pixels in [0, 1];
    ``embedding``: the tap that a linear probe reads; ``weights``: what was loaded, with the SHA-256 where it
    was a file.
    """

    name: str
    model: nn.Module
    taps: tuple[Tap, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    embedding: str
    weights: str


def preset_names() -> list[str]:
    """The backbones that have a name of their own; any model of timm goes by its name there."""
    return list(PRESETS)


def load_backbone(
    name: str,
    *,
    weights: str = "auto",
    image_size: int | None = None,
    taps: str = "auto",
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    sha256: str | None = None,
    seed: int = RANDOM_SEED,
) -> Backbone:
    """A backbone by the name of a preset (which comes before timm's) or of any timm model, with a tag or not.

    ``weights``: "auto" (those of an installed package or of the model hub), "random" (drawn by ``seed``: the
    same every time), or the path of a .safetensors or .pth file or of a directory that holds one. ``sha256``:
    what the file must have. ``image_size``: pixels a side; None is the model's own. ``taps``: "auto";
    "with_input", "pre_normalization", "pre_activation" (Table 6); "paper", "figure6" (resnet50), "paper",
    "appendix_c" (vitb16). ``dtype``: of weights and activations; features are float32.

    Raises UserError for an unknown name or variant, and for weights that cannot be had or do not fit.
    """
    from timm import get_pretrained_cfg  # here: it takes seconds, which most workers have no use for

    preset = PRESETS.get(name)
    timm_name = preset.timm_name if preset else _checked_timm_name(name)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size: expected 1 pixel or more, got {image_size}")
    config = get_pretrained_cfg(timm_name)
    own_size = config.input_size[-1]
    size = image_size or (preset.image_size if preset else own_size)
    # Only some models are built for one size; to the others an img_size would be an unknown argument.
    arguments = {"img_size": size} if config.fixed_input_size and size != own_size else {}
    with _naming_image_size(name, size):
        model, provenance = _create(timm_name, weights, sha256, arguments, seed)
        if size != own_size:
            with torch.inference_mode():
                model.eval()(torch.zeros(1, 3, size, size))
    model.eval().requires_grad_(False)
    chosen = _taps(model, name, preset, taps, size if config.fixed_input_size else own_size)
    model.to(device, DTYPES[dtype]).to(memory_format=torch.channels_last)
    embedding = "pre_logits" if any(tap.name == "pre_logits" for tap in chosen) else chosen[-1].name
    return Backbone(name, model, chosen, size, config.mean, config.std, embedding, provenance)


def _checked_timm_name(name: str) -> str:
    from timm import is_model, list_models, list_pretrained

    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        raise unknown("backbone", name, [*PRESETS, *list_models(f"{architecture[:4]}*")][:40])
    tags = [full.partition(".")[2] for full in list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise unknown(f"weights tag of {architecture}", tag, tags)
    return name


@contextmanager
def _naming_image_size(name: str, image_size: int) -> Iterator[None]:
    """Turn what timm raises where a model cannot be built for an image size, or take it, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"image_size {image_size} does not suit {name}: {error}") from error


def _create(
    timm_name: str, weights: str, sha256: str | None, arguments: dict[str, Any], seed: int
) -> tuple[nn.Module, str]:
    """The model and the provenance of its weights."""
    create = partial(_seeded_model, timm_name, arguments, seed)
    if weights == "random":
        if sha256:
            raise UserError("a sha256 was given, but random weights have no file: leave one of the two out")
        return create(), f"random, seed {seed}"
    path = find_weights(timm_name, weights)
    state, found = read_state_dict(path, sha256)
    try:
        if is_shipped_form(state):
            state = timm_names(state, create())
        model = create(pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"weights '{path}' do not fit {timm_name}: {error}") from error
    return model, f"{path.name}, sha256 {found}"


def _seeded_model(timm_name: str, arguments: dict[str, Any], seed: int, **pretrained: Any) -> nn.Module:
    """The model with random weights that are the same every time, unless ``pretrained`` says otherwise."""
    from timm import create_model

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return create_model(timm_name, **arguments, **pretrained)


def _taps(
    model: nn.Module, name: str, preset: Preset | None, variant: str, image_size: int
) -> tuple[Tap, ...]:
    taps = preset.taps if preset and preset.taps else discover_taps(model, image_size)
    fused = fused_modules(model) & {tap.module for tap in taps}
    own = preset.variants if preset else ()
    offered = ("auto", *own, "with_input", *(FUSED_VARIANTS if fused else ()))
    if variant not in offered:
        raise unknown(f"taps of {name}", variant, offered)
    if variant in FUSED_VARIANTS:
        return FUSED_VARIANTS[variant](taps, fused)
    if variant == "with_input":
        return with_input(taps)
    return PRESET_VARIANTS[variant](taps) if variant in PRESET_VARIANTS else taps
