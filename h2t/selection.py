"""Rules that score features, and what is kept by the scores (Sections 3.2 and 4.3)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.special import rel_entr
from scipy.stats import rankdata
from torch import Tensor

from h2t.errors import UserError
from h2t.features import FeatureLayout

Array = Tensor | np.ndarray


def keep_top(scores: np.ndarray, keep_fraction: float, offset: int = 0) -> np.ndarray:
    """Indices of the highest scores, int64 [n_kept] ascending; equal scores go to the lower index.

    ``n_kept`` is ``int(n_features * keep_fraction)``, computed in float64, which may be 0. ``offset`` leaves
    out that many of the highest scores (Figure 11, right). Raises UserError for a fraction outside (0, 1],
    and where fewer than ``n_kept`` are behind the offset.
    """
    if not 0 < keep_fraction <= 1:
        raise UserError(f"expected a keep_fraction in (0, 1], got {keep_fraction}")
    n_kept = int(len(scores) * float(keep_fraction))
    if not 0 <= offset <= len(scores) - n_kept:
        raise UserError(
            f"expected an offset of 0 to {len(scores) - n_kept}, with {n_kept} of {len(scores)} features "
            f"kept, got {offset}"
        )
    order = np.argsort(-np.asarray(scores), kind="stable")
    return np.sort(order[offset : offset + n_kept]).astype(np.int64)


# Rules by the weights of a head that was trained on all features.


def relevance_scores(weight: Array, layout: FeatureLayout | None = None) -> np.ndarray:
    """Relevance of each feature, float32 [n_features]: the sum over classes of its squared weights.

    ``weight`` [n_features, n_classes]; the layout does not matter. This is the square of s_i in Section 3.2,
    which ranks alike: Head2Toe's rule.
    """
    values = torch.as_tensor(weight)
    return torch.einsum("fc,fc->f", values, values).cpu().numpy()


def tap_means(weight: Array, layout: FeatureLayout) -> np.ndarray:
    """Score features by the mean s_i of their tap, [n_features]: "layer-wise" in Section 4.3.

    s_i is the norm itself here, as a mean of squares would rank otherwise. By these scores taps are kept one
    after the other until there are as many features as Head2Toe keeps. So the last tap is cut to its first
    features: the paper has "all features in a layer or none", but this is what the official code does.
    """
    norms = np.sqrt(relevance_scores(weight))
    means = [norms[columns].mean() if columns.stop > columns.start else 0.0 for columns in layout.slices]
    return np.repeat(means, layout.widths)


def tap_norms(weight: Array, layout: FeatureLayout) -> np.ndarray:
    """Score features by the norm of all weights of their tap: "layer-wise (group)" in Section 4.3.

    For weights trained with the regularizer ``layergroup``. The last tap is cut as in :func:`tap_means`.
    """
    scores = relevance_scores(weight)
    return np.repeat([np.sqrt(scores[columns].sum()) for columns in layout.slices], layout.widths)


# Rules by the training images alone: normalised inputs float32 [n, n_features], labels integer [n], and seed.


def random_scores(inputs: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Score features by numbers that the seed draws, float64 [n_features]."""
    return np.asarray(np.random.default_rng(seed).random(inputs.shape[1]))


def variances(inputs: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Score features by their variance over the training images, float32 [n_features]."""
    return np.asarray(inputs.var(axis=0))


def f_statistics(inputs: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Score features by the F-statistic of an analysis of variance over classes, [n_features]."""
    from sklearn.feature_selection import f_classif

    varies = inputs.min(axis=0) < inputs.max(axis=0)
    scores = np.zeros(inputs.shape[1])
    with np.errstate(divide="ignore"):  # classes that are told apart without error have infinite scores
        scores[varies] = f_classif(inputs[:, varies], labels)[0]
    return np.nan_to_num(scores)


BINS = 10


def mutual_informations(inputs: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Score features by their mutual information with the class, in nats, [n_features].

    Each feature is cut into BINS quantiles first: estimates by nearest neighbours would take minutes. Equal
    to scikit-learn's ``mutual_info_classif`` of the bins, which counts feature by feature: 20 times as slow.
    """
    ranks = rankdata(inputs, method="min", axis=0).astype(int) - 1  # equal values, often 0, share a bin
    bins = ranks * BINS // len(inputs)
    is_class = (labels[:, None] == np.unique(labels)).astype(np.float32)
    joint = np.stack([(bins == number).T.astype(np.float32) @ is_class for number in range(BINS)])
    shares = joint.astype(np.float64) / len(inputs)  # [BINS, n_features, n_classes]
    expected = shares.sum(axis=2, keepdims=True) * shares.sum(axis=0, keepdims=True)
    return np.sum(rel_entr(shares, expected), axis=(0, 2))


def tree_importances(inputs: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Score features by their importance in 100 extremely randomised trees, [n_features]."""
    from sklearn.ensemble import ExtraTreesClassifier

    return ExtraTreesClassifier(100, random_state=seed).fit(inputs, labels).feature_importances_


WEIGHT_RULES: dict[str, Callable[[Any, FeatureLayout], np.ndarray]] = {
    "score": relevance_scores,
    "tap_mean": tap_means,
    "tap_norm": tap_norms,
}
DATA_RULES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "random": random_scores,
    "variance": variances,
    "f_test": f_statistics,
    "mutual_information": mutual_informations,
    "extra_trees": tree_importances,
}
