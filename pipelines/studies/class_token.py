"""Table 7: what becomes of the class token of a vision transformer."""

from collections.abc import Mapping
from typing import Any

from h2t.backbones.loading import load_backbone
from pipelines.config import Config
from pipelines.variants import RecipeStudy


def backbones(config: Config) -> Mapping[str, Mapping[str, Any]]:
    """The class token alone at every tap, and beside the pooled tokens; none where nothing has tokens."""
    section = config.backbone
    loaded = load_backbone(section.name, weights="random", image_size=section.image_size, taps=section.taps)
    if not any(tap.form == "tokens" for tap in loaded.taps):
        return {}
    # On a grid the class token stands beside the others as it is.
    others = ("only_cls",) if section.tokens == "grid" else ("only_cls", "nopool_cls")
    return {token: {"cls_token": token} for token in others if token != section.cls_token}


STUDY = RecipeStudy(backbones)
