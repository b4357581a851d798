"""The backbone of a recipe, and how images reach it."""

from h2t.backbones.loading import Backbone
from h2t.backbones.pair import load_section
from h2t.backbones.tap_reader import feature_layout
from h2t.extraction import preprocessing_config
from h2t.features import FeatureLayout
from h2t.images.preprocessing import Preprocessing
from pipelines.config import BackboneConfig, Config


def load(config: BackboneConfig, device: str = "cpu", weights: str | None = None) -> Backbone:
    """The backbone of a recipe, with its weights or others."""
    section = config.model_dump()
    if weights:
        section |= {"weights": weights, "sha256": None}
        section["second"] = section["second"] and section["second"] | {"weights": weights, "sha256": None}
    return load_section(section, device)


def load_whole(config: BackboneConfig) -> Backbone:
    """The same with random weights and all taps, whatever ``max_depth``: to measure what a pass costs."""
    return load(config.model_copy(update={"max_depth": None}), weights="random")


def layouts(config: Config, backbone: Backbone) -> dict[int, FeatureLayout]:
    """The layout of a recipe's features at each of its target sizes."""
    how = config.backbone.aggregation
    return {size: feature_layout(backbone, size, how) for size in config.grid.target_size}


def preprocessing_of(config: BackboneConfig) -> Preprocessing:
    """How images reach the backbone of a recipe; no network is built to know it."""
    return preprocessing_config(config.name, config.image_size, config.resize, config.normalization)
