"""Table 6: features before the normalisation or the activation function, and the pooled input beside them."""

from collections.abc import Mapping
from typing import Any

from h2t.backbones.loading import ABLATIONS, tap_variants
from pipelines.config import Config
from pipelines.variants import RecipeStudy


def backbones(config: Config) -> Mapping[str, Mapping[str, Any]]:
    """The taps of Table 6 that the backbone can have."""
    offered = tap_variants(config.backbone.name, config.backbone.image_size)
    return {taps: {"taps": taps} for taps in ABLATIONS if taps in offered}


STUDY = RecipeStudy(backbones)
