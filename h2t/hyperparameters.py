"""One point of a search space (Appendix A of the paper)."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Hyperparameters:
    """One point of the search space.

    ``coefficient`` weighs the method's regularizer, if it has one; of nearest neighbours it is their number.
    ``offset``: how many features of the highest scores are left out (Figure 11, right).
    """

    method: str
    target_size: int
    learning_rate: float
    steps: int
    coefficient: float = 0.0
    keep_fraction: float = 1.0
    offset: int = 0
