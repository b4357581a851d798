"""The head of k nearest neighbours: the training rows themselves, which vote."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TEMPERATURE = 0.07
"""Of the votes, as Wu et al. (2018) and DINO have it: a neighbour counts exp(similarity / temperature)."""
ABSENT = 1e-12  # the votes of a class that no neighbour has: its logarithm is finite


def head_logits(
    inputs: np.ndarray, weight: np.ndarray, bias: np.ndarray, neighbours: "Neighbours | None"
) -> np.ndarray:
    """Logits float32 [n, n_classes] of a head from its inputs float32 [n, n_kept]."""
    values = inputs @ weight + bias
    return neighbours.logits(values) if neighbours else values


@dataclass(frozen=True)
class Neighbours:
    """How ``k`` nearest training rows vote; ``labels``: int64 [n_train], the class of each training row."""

    k: int
    labels: np.ndarray
    n_classes: int

    def logits(self, similarities: np.ndarray) -> np.ndarray:
        """Logarithms of the classes' shares of the votes, float32 [n, n_classes].

        ``similarities``: cosines with every training row, float32 [n, n_train].
        """
        k = min(self.k, len(self.labels))
        values, rows = torch.from_numpy(similarities).topk(k, dim=1)
        votes = torch.softmax(values / TEMPERATURE, dim=1)
        shares: Tensor = torch.zeros(len(similarities), self.n_classes)
        shares.scatter_add_(1, torch.from_numpy(self.labels)[rows], votes)
        return (shares + ABSENT).log().numpy()
