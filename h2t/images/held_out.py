"""Which images are kept for testing where they come without splits."""

from dataclasses import dataclass

import numpy as np

from h2t.errors import UserError
from h2t.images.source import SourceSplit


@dataclass(frozen=True)
class HeldOut:
    """A share of each class, chosen by a seed.

    Raises UserError for a share outside (0, 1) and a negative seed.
    """

    fraction: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"test_fraction: expected a number between 0 and 1, got {self.fraction}")
        if self.seed < 0:
            raise UserError(f"seed: expected 0 or more, got {self.seed}")

    def __str__(self) -> str:
        return f"{self.fraction} for testing, seed {self.seed}"

    def rows(self, labels: np.ndarray, split: SourceSplit) -> np.ndarray:
        """int64: the rows of a split; for testing of every class the rounded share, at random."""
        generator = np.random.default_rng(self.seed)
        for_testing = np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            for_testing[generator.permutation(rows)[: round(self.fraction * len(rows))]] = True
        return np.flatnonzero(for_testing if split == "test" else ~for_testing)
