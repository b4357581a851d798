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
    return {token: {"cls_token": token} for token in ("only_cls", "nopool_cls") if token != section.cls_token}


STUDY = RecipeStudy(backbones)
