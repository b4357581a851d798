"""Multinomial logistic regression on a kernel: the exact minimum, in as many dimensions as there are rows.

With K = U S U' of the training images and P = U S^(1/2), the head minimises

    sum of the cross-entropies of P V + b  +  penalty / 2 |V|^2

over V and the biases b. It is the head on any features whose products are K, written in the space that the
rows span (the representer theorem); its dual weights U S^(-1/2) V give those of the features.

L-BFGS takes hundreds of steps for it, since the values of S span many powers of ten. But the second
derivative of a cross-entropy is at most 1/2 (Böhning 1992), and less for most rows, so that P' P / 4 +
penalty, which is diagonal, stands for the Hessian: in variables divided by its root there are a third as
many.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from h2t.folds import folds
from h2t.heads.solution import ABSENT

STEPS, MEMORY = 300, 20
TOLERANCE = 1e-8  # of the loss, relative
TOLERANCE_TO_CHOOSE = 1e-6  # where losses of penalties are compared, which differ by far more

Dual = tuple[np.ndarray, np.ndarray]
"""Dual weights float64 [n, n_classes], whose columns add up to 0, and biases float64 [n_classes]."""


def kernel_logistic(
    kernel: np.ndarray, targets: np.ndarray, penalties: Sequence[float], tolerance: float = TOLERANCE
) -> Iterator[Dual]:
    """The head of each penalty, in their order, each from where the one before has ended.

    ``kernel`` float64 [n, n], centred; ``targets`` one-hot float64 [n, n_classes]. A class without rows has
    weights of 0 and the bias ``ABSENT``.
    """
    values, vectors = np.linalg.eigh(kernel)
    held = values > max(values[-1], 0.0) * np.finfo(np.float32).eps  # the others are rounding
    lengths, vectors = np.sqrt(values[held]), vectors[:, held]
    present = targets.sum(0) > 0
    known = targets[:, present]
    shares = np.log(known.mean(0))
    rotated = np.zeros((len(lengths) + 1, known.shape[1]))
    for penalty in penalties:
        rotated = _minimum(lengths, vectors, known, shares, penalty, rotated, tolerance)
        dual, bias = np.zeros_like(targets), np.full(len(present), ABSENT)
        dual[:, present] = vectors @ (rotated[:-1] / lengths[:, None])
        bias[present] = shares + rotated[-1]
        yield dual, bias


def _minimum(
    lengths: np.ndarray,
    vectors: np.ndarray,
    targets: np.ndarray,
    shares: np.ndarray,
    penalty: float,
    start: np.ndarray,
    tolerance: float,
) -> np.ndarray:
    """V and, below it, the biases less ``shares``, float64 [rank + 1, n_classes]; so is ``start``."""
    n_rows, n_classes = targets.shape
    root = np.sqrt(np.append(lengths**2 / 4 + penalty, n_rows / 4))[:, None]
    inputs = np.column_stack([vectors * lengths, np.ones(n_rows)]) / root[:, 0]
    weighed = np.append(np.full(len(lengths), penalty), 0.0)[:, None] / root**2

    def value(variables: np.ndarray) -> tuple[float, np.ndarray]:
        weights = variables.reshape(-1, n_classes)
        logs = log_softmax(inputs @ weights + shares, axis=1)
        loss = (weighed * weights**2).sum() / 2 - (logs * targets).sum()
        gradient = inputs.T @ (np.exp(logs) - targets) + weighed * weights
        return float(loss) / n_rows, gradient.ravel() / n_rows

    options = {"maxiter": STEPS, "maxcor": MEMORY, "ftol": tolerance, "gtol": 0.0}
    found = minimize(value, (start * root).ravel(), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(-1, n_classes) / root


def held_out_losses(
    kernel: np.ndarray, targets: np.ndarray, penalties: Sequence[float], n_folds: int = 5
) -> np.ndarray:
    """The mean cross-entropy of images that a head has not seen, of each penalty, float64 [n_penalties].

    In consecutive folds, as few as there are images if these are fewer.
    """
    losses = np.zeros(len(penalties))
    for rows, held in folds(len(targets), min(n_folds, len(targets))):
        inside = kernel[np.ix_(rows, rows)]
        means = inside.mean(0)
        centred = inside - means - means[:, None] + means.mean()
        between = kernel[np.ix_(held, rows)] - means
        heads = kernel_logistic(centred, targets[rows], penalties, TOLERANCE_TO_CHOOSE)
        for number, (dual, bias) in enumerate(heads):
            losses[number] -= (log_softmax(between @ dual + bias, axis=1) * targets[held]).sum()
    return losses / len(targets)
