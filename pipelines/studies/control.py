"""Figure 4, right: the embeddings of two networks side by side, as many features as with one more tap."""

from collections.abc import Mapping
from typing import Any

from h2t.backbones.pair import EMBEDDINGS
from pipelines.config import Config
from pipelines.variants import RecipeStudy


def backbones(config: Config) -> Mapping[str, Mapping[str, Any]]:
    """The embedding of the recipe's backbone and that of its ``control``."""
    return {"second": {"taps": EMBEDDINGS, "second": config.control}} if config.control else {}


STUDY = RecipeStudy(backbones, methods=("all",), needs=("linear",))
