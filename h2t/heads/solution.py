"""What a solver is given, and what it finds: the weights of a head."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from h2t.features import FeatureLayout
from h2t.heads.neighbours import Neighbours

ABSENT = -100.0  # the bias of a class without training rows, which is then never predicted


class Problem(NamedTuple):
    """Features float32 [n, n_features] of unit norm per tap, labels integer [n], and what these are of."""

    features: np.ndarray
    labels: np.ndarray
    n_classes: int
    layout: FeatureLayout


class Solution(NamedTuple):
    """Weights float32 [n_features, n_classes] and biases float32 [n_classes].

    Of ``neighbours`` there are as many columns as training rows in place of the classes. ``on_kept`` solves
    for a head on some of the features, given with their contributions on all (the norm of the weights times
    the standard deviation), where a solver can do that.
    """

    weight: np.ndarray
    bias: np.ndarray
    neighbours: Neighbours | None = None
    on_kept: "Callable[[Problem, np.ndarray], Solution] | None" = None
