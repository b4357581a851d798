"""A frozen timm model with its image size, the normalization of its input, and its ordered taps."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from h2t.backbones.auto_taps import discover_taps, fused_modules
from h2t.backbones.presets import FUSED_VARIANTS, PRESET_VARIANTS, PRESETS, Preset, name_in_timm, with_input
from h2t.backbones.pretrained import (
    RANDOM_SEED,
    find_weights,
    is_shipped_form,
    random_identity,
    read_state_dict,
    timm_names,
)
from h2t.backbones.tap import Tap
from h2t.errors import UserError, unknown
from h2t.features import EMBEDDING, default_embedding

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Backbone:
    """A model in evaluation mode without gradients, and what is needed to feed and to tap it.

    ``image_size``: pixels a side; ``mean``, ``std``: of its input, per channel, for pixels in [0, 1];
    ``embedding``: the tap that a linear probe reads; ``weights``: what was loaded, with the SHA-256 where it
    was a file; ``precision``: of :data:`PRECISIONS`.
    """

    name: str
    model: nn.Module
    taps: tuple[Tap, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    embedding: str
    weights: str
    precision: str = "float32"

    @property
    def n_prefix(self) -> int:
        """How many tokens, those of class and registers, come before those of patches."""
        return getattr(self.model, "num_prefix_tokens", 0)

    def only(self, taps: Collection[str]) -> "Backbone":
        """The same with the taps of these names alone."""
        return replace(self, taps=tuple(tap for tap in self.taps if tap.name in taps))


def input_config(name: str, image_size: int | None = None) -> tuple[int, Any]:
    """Pixels a side of a backbone's input (None: its own), and timm's description of the model, not built.

    Raises UserError for an unknown name and for an image without pixels.
    """
    from timm import get_pretrained_cfg  # here: it takes seconds, which most workers have no use for

    config = get_pretrained_cfg(name_in_timm(name))
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size: expected 1 pixel or more, got {image_size}")
    return image_size or (PRESETS[name].image_size if name in PRESETS else config.input_size[-1]), config


def load_backbone(
    name: str,
    *,
    weights: str = "auto",
    image_size: int | None = None,
    taps: str = "auto",
    device: str | torch.device = "cpu",
    precision: str = "float32",
    sha256: str | None = None,
    seed: int = RANDOM_SEED,
) -> Backbone:
    """Load a preset, or any model of timm by its name there, with a weights tag or not; presets come first.

    ``weights``: "auto" (those of an installed package or of the model hub), "random" (drawn by ``seed``: the
    same every time), or the path of a .safetensors or .pth file or of a directory that holds one. ``sha256``:
    what the file must have. ``image_size``: pixels a side; None is the model's own. ``taps``: "auto";
    "with_input", "pre_normalization", "pre_activation" (Table 6); "paper", "figure6" (resnet50), "paper",
    "appendix_c" (vitb16). ``precision``: "float32", "tf32" (the same, but for products and convolutions on a
    GPU) or "bfloat16", of weights and activations; features are float32.

    Raises UserError for an unknown name or variant, and for weights that cannot be had or do not fit.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    size, config = input_config(name, image_size)
    timm_size = config.input_size[-1]
    # Only some models are built for one size; to the others an img_size would be an unknown argument.
    arguments = {"img_size": size} if config.fixed_input_size and size != timm_size else {}
    with _naming_image_size(name, size):
        model, provenance = _create(name_in_timm(name), weights, sha256, arguments, seed)
        if size != timm_size:
            with torch.inference_mode():
                model.eval()(torch.zeros(1, 3, size, size))
    model.eval().requires_grad_(False)
    taps_read = _taps(model, name, taps, size if config.fixed_input_size else timm_size)
    model.to(device, PRECISIONS[precision]).to(memory_format=torch.channels_last)
    embedding = default_embedding([tap.name for tap in taps_read])
    if embedding != EMBEDDING:
        raise UserError(
            f"{name}: its classifier reads nothing that can be tapped, so it has no embedding for a head; "
            "choose another backbone"
        )
    return Backbone(name, model, taps_read, size, config.mean, config.std, embedding, provenance, precision)


ABLATIONS = ("with_input", *FUSED_VARIANTS)
"""The variants of taps of Table 6."""


def tap_variants(name: str, image_size: int | None = None) -> tuple[str, ...]:
    """The variants of taps that a backbone has. Raises UserError as ``load_backbone`` does."""
    loaded = load_backbone(name, weights="random", image_size=image_size)
    return _offered(name, fused_modules(loaded.model) & {tap.module for tap in loaded.taps})


def _offered(name: str, fused: Collection[str]) -> tuple[str, ...]:
    """``fused``: the tapped modules that normalize and activate."""
    preset = PRESETS.get(name, Preset(name, 0))
    return ("auto", *preset.variants, "with_input", *(FUSED_VARIANTS if fused else ()))


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
        provenance = random_identity(seed, sha256)
        return create(), provenance
    path = find_weights(timm_name, weights)
    state, digest = read_state_dict(path, sha256)
    try:
        if is_shipped_form(state):
            state = timm_names(state, create())
        model = create(pretrained=True, pretrained_cfg_overlay={"state_dict": state})
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"weights '{path}' do not fit {timm_name}: {error}") from error
    return model, f"{path.name}, sha256 {digest}"


def _seeded_model(timm_name: str, arguments: dict[str, Any], seed: int, **pretrained: Any) -> nn.Module:
    """The model with random weights that are the same every time, unless ``pretrained`` says otherwise."""
    from timm import create_model

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return create_model(timm_name, **arguments, **pretrained)


def _taps(model: nn.Module, name: str, variant: str, image_size: int) -> tuple[Tap, ...]:
    taps = PRESETS.get(name, Preset(name, image_size)).taps or discover_taps(model, image_size)
    fused = fused_modules(model) & {tap.module for tap in taps}
    offered = _offered(name, fused)
    if variant not in offered:
        raise unknown(f"taps of {name}", variant, offered)
    if variant in FUSED_VARIANTS:
        return FUSED_VARIANTS[variant](taps, fused)
    if variant == "with_input":
        return with_input(taps)
    return PRESET_VARIANTS[variant](taps) if variant in PRESET_VARIANTS else taps
