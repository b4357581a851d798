"""The specification of a linear head's training, without the libraries that train it."""

from dataclasses import dataclass
from typing import Literal

Regularizer = Literal["l1", "l2", "l21", "layergroup"]
Precision = Literal["float32", "tf32", "bfloat16"]
Normalization = Literal["unit", "per_feature", "none"]
"""Of features: unit norm per example and tap (the paper's); zero mean and unit variance of each; none."""


@dataclass(frozen=True)
class HeadSpec:
    """The training of one head: Adam with a cosine decay to zero and a regularizer on the weights.

    ``steps`` counts mini-batches. ``coefficient`` weighs the sum of absolute weights (``l1``), of squared
    weights (``l2``), of the norms of the features' rows (``l21``, Section 3.2) or of the norms of all weights
    of a tap (``layergroup``, Section 4.3). ``seed`` draws the first weights.
    """

    learning_rate: float
    steps: int
    regularizer: Regularizer | None = None
    coefficient: float = 0.0
    seed: int = 0
