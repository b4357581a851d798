"""Head2Toe and the methods that it is compared with, without Ray: usable from a notebook."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h2t.adapter import Adapter
    from h2t.backbones.aggregation import Aggregation
    from h2t.backbones.loading import load_backbone
    from h2t.estimator import Head2ToeClassifier
    from h2t.extraction import extract_features, write_features
    from h2t.features import FeatureLayout
    from h2t.head2toe import fit

__all__ = [
    "Adapter",
    "Aggregation",
    "FeatureLayout",
    "Head2ToeClassifier",
    "extract_features",
    "fit",
    "load_backbone",
    "write_features",
]

_MODULES = {
    "Adapter": "h2t.adapter",
    "Aggregation": "h2t.backbones.aggregation",
    "FeatureLayout": "h2t.features",
    "Head2ToeClassifier": "h2t.estimator",
    "extract_features": "h2t.extraction",
    "fit": "h2t.head2toe",
    "load_backbone": "h2t.backbones.loading",
    "write_features": "h2t.extraction",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: torch takes seconds, and `h2t --help` needs none."""
    if name not in _MODULES:
        raise AttributeError(f"module 'h2t' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
