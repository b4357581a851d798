"""One point of a search space (Appendix A of the paper)."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Hyperparameters:
    """One point of the search space; ``coefficient`` weighs the method's regularizer, if it has one."""

    method: str
    target_size: int
    learning_rate: float
    steps: int
    coefficient: float = 0.0
    keep_fraction: float = 1.0
