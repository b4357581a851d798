"""What a solver is given, and what it finds: the weights of a head."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from h2t.features import FeatureLayout
from h2t.heads.neighbours import Neighbours

ABSENT = -100.0  # the bias of a class without training rows, which is then never predicted


@dataclass(frozen=True)
class Problem:
    """Features of training rows, which need not be in memory together, and their labels integer [n].

    ``read``: from a range of columns, of one tap or of all, to features float32 [n, n_columns] of unit norm
    per tap, which may be written. ``products``: from a tap to the products float32 [n, n] of its features
    less their means, where they are known already. ``device``: where large products are computed.
    """

    read: Callable[[slice], np.ndarray]
    labels: np.ndarray
    n_classes: int
    layout: FeatureLayout
    products: Callable[[int], np.ndarray] | None = None
    device: str = "cpu"

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        labels: np.ndarray,
        n_classes: int,
        layout: FeatureLayout,
        device: str = "cpu",
    ) -> "Problem":
        """That of a matrix float32 [n, n_features], of unit norm per tap."""
        return cls(lambda columns: features[:, columns].copy(), labels, n_classes, layout, device=device)

    @cached_property
    def features(self) -> np.ndarray:
        """All features together, for solvers that want them so."""
        return self.read(slice(0, self.layout.n_features))


class Solution(NamedTuple):
    """Weights float32 [n_features, n_classes] and biases float32 [n_classes].

    Of ``neighbours`` there are as many columns as training rows in place of the classes. Where a solver knows
    them: ``contributions`` float64 [n_features], the norm of each feature's weights times its standard
    deviation; ``outputs`` float32 [n, n_classes] for the training rows; ``on_kept``, which solves for a head
    on some of the features, given with their contributions on all.
    """

    weight: np.ndarray
    bias: np.ndarray
    neighbours: Neighbours | None = None
    contributions: np.ndarray | None = None
    outputs: np.ndarray | None = None
    on_kept: "Callable[[Problem, np.ndarray], Solution] | None" = None
