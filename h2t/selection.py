"""Rules that keep features, by the weights of a head trained on all of them (Sections 3.2 and 4.3)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from h2t.errors import UserError
from h2t.features import FeatureLayout

Array = Tensor | np.ndarray
# From weight [n_features, n_classes], layout, keep_fraction and seed to kept, int64 [n_kept] ascending.
Rule = Callable[[Any, FeatureLayout, float, int], np.ndarray]


def relevance_scores(weight: Array) -> np.ndarray:
    """Relevance of each feature, float32 [n_features]: the sum over classes of its squared weights.

    ``weight`` [n_features, n_classes]. This is the square of s_i in Section 3.2, which ranks alike.
    """
    values = torch.as_tensor(weight)
    return torch.einsum("fc,fc->f", values, values).cpu().numpy()


def keep_top(scores: np.ndarray, keep_fraction: float) -> np.ndarray:
    """Indices of the highest scores, int64 [n_kept] ascending; equal scores go to the lower index.

    ``n_kept`` is ``int(n_features * keep_fraction)``, computed in float64, which may be 0. Raises UserError
    for a fraction outside (0, 1].
    """
    if not 0 < keep_fraction <= 1:
        raise UserError(f"expected a keep_fraction in (0, 1], got {keep_fraction}")
    n_kept = int(len(scores) * float(keep_fraction))
    order = np.argsort(-np.asarray(scores), kind="stable")
    return np.sort(order[:n_kept]).astype(np.int64)


def by_score(weight: Array, layout: FeatureLayout, keep_fraction: float, seed: int) -> np.ndarray:
    """Keep the features of the highest relevance scores, whichever tap they are from: Head2Toe's rule."""
    return keep_top(relevance_scores(weight), keep_fraction)


def by_tap_mean(weight: Array, layout: FeatureLayout, keep_fraction: float, seed: int) -> np.ndarray:
    """Keep the taps of the highest mean of s_i: "layer-wise" in Section 4.3.

    s_i is the norm itself here, as a mean of squares would rank otherwise. Taps are kept one after the other
    until there are as many features as ``by_score`` keeps. So the last tap is cut to its first features: the
    paper has "all features in a layer or none", but this is what the official code does.
    """
    norms = np.sqrt(relevance_scores(weight))
    means = [norms[columns].mean() if columns.stop > columns.start else 0.0 for columns in layout.slices]
    return keep_top(np.repeat(means, layout.widths), keep_fraction)


def by_tap_norm(weight: Array, layout: FeatureLayout, keep_fraction: float, seed: int) -> np.ndarray:
    """Keep the taps of the largest norm of all their weights: "layer-wise (group)" in Section 4.3.

    For weights trained with the regularizer ``layergroup``. The last tap is cut as in :func:`by_tap_mean`.
    """
    scores = relevance_scores(weight)
    norms = [np.sqrt(scores[columns].sum()) for columns in layout.slices]
    return keep_top(np.repeat(norms, layout.widths), keep_fraction)


def at_random(weight: object, layout: FeatureLayout, keep_fraction: float, seed: int) -> np.ndarray:
    """Keep features drawn by the seed, whatever the weights."""
    return keep_top(np.random.default_rng(seed).random(layout.n_features), keep_fraction)


RULES: dict[str, Rule] = {
    "score": by_score,
    "tap_mean": by_tap_mean,
    "tap_norm": by_tap_norm,
    "random": at_random,
}
