"""A head on a learned mixture of tap kernels: all taps, solved for in seconds.

**Kernels.** X_t [n, n_t] are the features of tap t, of unit norm per image and tap as everywhere, centred
over the training images. Tap t gives the kernel K_t = X_t X_t' / d_t, where d_t is the mean of its
diagonal, so that taps of any width and any spread start alike; trace normalisation is usual where kernels
are learned (Cristianini et al. 2001; Ong and Zien 2008). The head works with the mixture K = sum of w_t
K_t, with weights above 0 that add up to 1. A weight w_t for a tap is a prior variance w_t / d_t for each of
its weights: this is multiple-kernel learning (Lanckriet et al. 2004; Gönen and Alpaydın 2011), or banded
ridge regression with a band per tap (Nunez-Elizalde, Huth and Gallant 2019; Dupré la Tour et al. 2022, who
wrote himalaya). Nothing below takes more than the n x n products of the rows, so that its cost does not
depend on how many features there are once these are known.

**Weights, by leave-one-out.** Let Y be the one-hot labels and y their means. Ridge regression with a free
intercept has dual weights A = G (Y - y), G = (K + l I)^-1, and predicts y + K A = Y - l A for its own rows.
What it would predict for image i without it follows without another fit. Add the intercept as one more
direction of infinite prior variance: the inverse becomes H = G - 1 1' / (l n), as G 1 = 1 / l (K is
centred), and H Y = G (Y - y) = A. In any regression (Y - K A)_i / (1 - S_ii) is the residual of image i
when it is left out, with S = 1 - l H the matrix from labels to predictions (Allen 1974; Golub, Heath and
Wahba 1979):

    Y_i - l A_i / (l G_ii - 1/n)    is the prediction for image i by all others, exactly.

w, l and a scale of the outputs are those of the least mean cross-entropy of scaled leave-one-out
predictions, plus the prior PRIOR * mean of -log(n_taps w_t), a symmetric Dirichlet; found by L-BFGS from
equal weights. With D the gradient of the loss by A and e that by the diagonal of G, dG = -G dK G gives the
gradient by K:

    -(G D) A' - G diag(e) G,    and by log w_t: w_t times its sum of products with K_t - K.

A step costs n^3 and one pass over the kernels.

**Head, by logistic regression.** A squared error does well for choosing kernels and less well for choosing
classes: it pulls outputs that are right by far back to 1. With the weights as they are, multinomial
logistic regression on K (``h2t.heads.kernel_logistic``) is the head; five folds of the training images
choose its penalty, by cross-entropy. Its dual weights B, whose columns add up to 0, are those of features:
W_t = w_t X_t' B / d_t. So the head is linear, as Head2Toe's.

**Reweighting, by feature.** The contribution c_f of a feature is the norm of its weights times its standard
deviation. Head2Toe's regularizer, the group lasso, sums such norms; it is the least of (1/2) sum of (c_f^2
/ v_f + v_f) over v, at v_f = c_f (Bach et al. 2012, Section 5): ridge regression with prior variances v_f,
each in turn set to what the feature has contributed (Daubechies et al. 2010). So features of variance 1 are
multiplied by the root of their contribution and the head is solved for again, once or more: what does
little does less, as the group lasso has it, and no step is larger than n x n. Cross-validation chooses how
often, of ROUNDS in ``h2t.methods``.

**Kept features.** Those of the highest contributions, after a round of reweighting, with unit norm over
what is kept; the head on these is reweighted by their contributions too.

**Size.** Products of taps are known before the fit or computed first (2 n^2 operations a feature). After
that, features are read tap by tap: a pass gives the weights, by the dual ones, and adds up the kernel of the
next round. So those of one tap are in memory at a time, and the products of all: 4 n^2 bytes a tap. Of more
than MIXTURE_ROWS training images, so many choose the weights of the taps and the penalty; K is of all.

Everything is chosen on training images, and what is constant here was set on those of the demo's tasks.

References: Allen 1974 (Technometrics 16:125). Golub, Heath, Wahba 1979 (Technometrics 21:215). Cristianini
et al. 2001 (NIPS 14). Lanckriet et al. 2004 (JMLR 5:27). Ong, Zien 2008 (WABI). Daubechies et al. 2010
(CPAM 63:1). Gönen, Alpaydın 2011 (JMLR 12:2211). Bach, Jenatton, Mairal, Obozinski 2012 (Foundations and
Trends in Machine Learning 4:1). Nunez-Elizalde, Huth, Gallant 2019 (NeuroImage 197:482). Dupré la Tour et
al. 2022 (NeuroImage 264:119728).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import softmax
from torch import Tensor

from h2t.errors import UserError
from h2t.features import FeatureLayout
from h2t.heads.kernel_logistic import Dual, held_out_losses, kernel_logistic
from h2t.heads.solution import Problem, Solution

ITERATIONS = 40
PRIOR = 0.003
"""Nats by which the mean log weight counts.

It keeps the leave-one-out loss, which is optimistic once it has chosen 50 weights, from taking one tap. Of
0.003, 0.03 and 0.3 this one did best in five-fold cross-validation, on training images of three tasks.
"""
PENALTIES = (0.1, 0.03, 0.01, 0.003, 0.001)
"""Of the logistic regression, for a kernel whose mean diagonal is 1."""
CONSTANT = 1e-9  # a share of the squares of features that is rounding
FLOOR = 1e-4  # a share of the squares of a feature that its variance has at least
LARGEST_LOG = 12.0  # of a weight beside the others'
LOG_RIDGE = (-7.0, 7.0)  # of l beside a mean diagonal of 1; below, rounding of float32 kernels shows
LOG_SCALE = (-2.0, 5.0)
MOST_ROWS = 10_000
"""Training images that a head is solved for: its matrices take 8 n^2 bytes, its time grows with n^3."""
MIXTURE_ROWS = 2000
"""Training images, evenly spread, that choose the taps' weights and the penalty where there are more."""


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


class KernelHead(NamedTuple):
    """A head by its dual weights, which needs no feature but only products of features.

    ``factors`` float64 [n_taps]: w_t / d_t; ``kernel`` float64 [n, n]: K, centred; ``penalty`` of the
    logistic regression; ``dual`` float64 [n, n_classes], whose columns add up to 0; ``bias`` float64
    [n_classes].
    """

    factors: np.ndarray
    kernel: np.ndarray
    penalty: float
    dual: np.ndarray
    bias: np.ndarray

    @property
    def outputs(self) -> np.ndarray:
        """For the training images, float64 [n, n_classes]."""
        return self.kernel @ self.dual + self.bias


def check_rows(n_rows: int) -> None:
    """Raise UserError for more training images than a head can be solved for."""
    if n_rows > MOST_ROWS:
        raise UserError(
            f"tap kernels: {n_rows:,} training images; expected at most {MOST_ROWS:,}, since the products of "
            "all pairs are solved for; head2toe has no such limit"
        )


def kernel_head(problem: Problem) -> KernelHead:
    """The head of a learned mixture of the taps. Raises UserError for more than ``MOST_ROWS`` rows."""
    n_rows = len(problem.labels)
    check_rows(n_rows)
    targets = _one_hot(problem)
    some = np.linspace(0, n_rows - 1, min(n_rows, MIXTURE_ROWS)).round().astype(int)
    kernels, diagonals = tap_grams(problem, some if len(some) < n_rows else None)
    weights = learn_mixture(kernels, torch.from_numpy(targets[some])).weights
    factors, kernel = weights / diagonals, _mixed(kernels, torch.from_numpy(weights)).numpy()
    del kernels
    penalty = PENALTIES[int(held_out_losses(kernel, targets[some], PENALTIES).argmin())]
    if len(some) < n_rows:
        kernel = np.zeros((n_rows, n_rows))
        for tap, factor in enumerate(factors):
            kernel += factor * tap_products(problem, tap)
    ((dual, bias),) = kernel_logistic(kernel, targets, [penalty])
    return KernelHead(factors, kernel, penalty, dual, bias)


def tap_kernels(problem: Problem, coefficients: Sequence[float]) -> Iterator[Solution]:
    """The head of a learned mixture of the taps; a coefficient is how often it is reweighted by feature.

    ``coefficients`` ascending. Features are read tap by tap, once for each round and once more; those of one
    tap are in memory at a time. Raises UserError for more than ``MOST_ROWS`` rows.
    """
    head, n_rounds = kernel_head(problem), int(max(coefficients, default=0))
    kernel, penalty, dual = head.kernel, head.penalty, (head.dual, head.bias)
    roots = np.sqrt(np.repeat(head.factors, problem.layout.widths))
    for number in range(n_rounds + 1):
        following = _WeighedKernel(problem) if number < n_rounds else None
        solution = _by_features(problem, kernel, dual, roots, following)
        for coefficient in coefficients:
            if int(coefficient) == number:
                yield solution._replace(on_kept=partial(reweighted, penalty=penalty))
        if following:
            kernel, roots = following.scaled()
            (dual,) = kernel_logistic(kernel, _one_hot(problem), [penalty])


def reweighted(problem: Problem, contributions: np.ndarray, penalty: float) -> Solution:
    """The head where a feature of variance 1 has its contribution for the prior variance of its weights."""
    weighed = _WeighedKernel(problem)
    for columns in problem.layout.slices:
        weighed.add(_centred(problem.read(columns), problem.device), contributions[columns])
    kernel, roots = weighed.scaled()
    (dual,) = kernel_logistic(kernel, _one_hot(problem), [penalty])
    return _by_features(problem, kernel, dual, roots)


def held_out_outputs(
    head: KernelHead, products: Callable[[int], np.ndarray], rows: np.ndarray, held: np.ndarray
) -> np.ndarray:
    """Outputs float32 [m, n_classes] of images by their products with the training images alone.

    ``products``: from a tap to those [n, n] of all images; ``rows`` of the training images, ``held`` int [m].
    """
    outputs = np.tile(head.bias, (len(held), 1))
    for tap, factor in enumerate(head.factors):
        known = products(tap)
        means = known[np.ix_(rows, rows)].mean(0, dtype=np.float64)
        outputs += factor * ((known[np.ix_(held, rows)] - means) @ head.dual)
    return outputs.astype(np.float32)


class StreamedWeights:
    """The weights of heads by features that come in batches, of which none is kept.

    The columns of dual weights add up to 0, so that features need not be less their means.
    """

    def __init__(self, head: KernelHead, layout: FeatureLayout) -> None:
        self.head, self.layout = head, layout
        self.weight = np.zeros((layout.n_features, head.dual.shape[1]))
        self.means = np.zeros(layout.n_features)

    def add(self, tap: int, rows: slice, features: np.ndarray) -> None:
        """Add features float32 [b, width] of a tap, of unit norm; ``rows``: which of the head's they are."""
        columns = self.layout.slices[tap]
        self.weight[columns] += features.T @ self.head.dual[rows].astype(np.float32)
        self.means[columns] += features.sum(0, dtype=np.float64) / len(self.head.dual)

    def solution(self) -> Solution:
        """The head, once all features were added."""
        weight = self.weight * np.repeat(self.head.factors, self.layout.widths)[:, None]
        bias = self.head.bias - self.means @ weight
        return Solution(weight.astype(np.float32), bias.astype(np.float32))


class _Centred(NamedTuple):
    """Features less their means, float32 [n, n_columns], and of each its mean and its variance, float64.

    A variance is 0 where there is rounding alone.
    """

    rows: Tensor
    means: Tensor
    variances: Tensor


def _centred(features: np.ndarray, device: str) -> _Centred:
    """Of features float32 [n, n_columns], which are written over."""
    rows = torch.from_numpy(features).to(device)
    means = rows.mean(0, dtype=torch.float64)
    rows -= means.float()
    variances = torch.linalg.vector_norm(rows, dim=0).double().square() / len(rows)
    return _Centred(rows, means, variances * (variances > CONSTANT * means**2))


class _WeighedKernel:
    """A kernel of features of variance 1 times the root of their contributions, added up tap by tap.

    A feature that varies by less than a hundredth of its size counts as if it varied by that much: weights
    that would be larger than others by orders of magnitude would bring rounding into the outputs.
    """

    def __init__(self, problem: Problem) -> None:
        n_rows = len(problem.labels)
        self.kernel = torch.zeros(n_rows, n_rows, dtype=torch.float64, device=problem.device)
        self.roots: list[Tensor] = []
        self.diagonal = 0.0

    def add(self, features: _Centred, contributions: np.ndarray) -> None:
        """Add the features of a tap; ``contributions`` float64 [n_columns]."""
        rows, means, variances = features
        floors = FLOOR * (variances + means**2)
        counted = torch.maximum(variances, torch.where(floors > 0, floors, 1.0))
        factors = torch.from_numpy(contributions).to(rows.device) / counted * (variances > 0)
        self.diagonal += float(factors @ variances)
        self.roots.append(factors.sqrt())
        weighed = rows * self.roots[-1].float()
        self.kernel += weighed @ weighed.T

    def scaled(self) -> tuple[np.ndarray, np.ndarray]:
        """The kernel, float64 [n, n], for a mean diagonal of 1, and what each feature is multiplied by."""
        scale = 1 / max(self.diagonal, float(np.finfo(np.float32).tiny))
        return (self.kernel * scale).cpu().numpy(), torch.cat(self.roots).cpu().numpy() * np.sqrt(scale)


def _by_features(
    problem: Problem,
    kernel: np.ndarray,
    dual: Dual,
    roots: np.ndarray,
    following: _WeighedKernel | None = None,
) -> Solution:
    """A head by its weights on features, which times ``roots``, and less their means, have ``kernel``.

    The weights come from features less their means: these would cancel at a loss of digits. ``following`` is
    given the features with what each contributes.
    """
    by_rows, bias = dual
    weight = np.empty((problem.layout.n_features, problem.n_classes), np.float32)
    contributions, outputs = np.empty(len(weight)), kernel @ by_rows + bias
    narrow = torch.from_numpy(by_rows.astype(np.float32)).to(problem.device)
    for columns in problem.layout.slices:
        features = _centred(problem.read(columns), problem.device)
        factors = torch.from_numpy(np.square(roots[columns, None])).to(problem.device)
        part = features.rows.T @ narrow * factors.float()
        sizes = torch.linalg.vector_norm(part.double(), dim=1)
        contributions[columns] = (sizes * features.variances.sqrt()).cpu().numpy()
        bias = bias - (features.means @ part.double()).cpu().numpy()
        weight[columns] = part.cpu().numpy()
        if following:
            following.add(features, contributions[columns])
    return Solution(
        weight,
        bias.astype(np.float32),
        contributions=contributions,
        outputs=outputs.astype(np.float32),
    )


def _one_hot(problem: Problem) -> np.ndarray:
    """float64 [n, n_classes]."""
    return np.eye(problem.n_classes)[problem.labels]


def tap_products(problem: Problem, tap: int) -> np.ndarray:
    """X_t X_t', float32 [n, n], of features less their means: as they are known, or from the features."""
    if problem.products:
        return problem.products(tap)
    return centred_products(problem.read(problem.layout.slices[tap]), problem.device)


def centred_products(features: np.ndarray, device: str = "cpu") -> np.ndarray:
    """X X', float32 [n, n], of features float32 [n, n_columns] less their means, which are written over."""
    rows, _, _ = _centred(features, device)
    return (rows @ rows.T).cpu().numpy()


def of_rows(products: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Products float32 [m, m] of some rows less *their* mean, from those [n, n] of all less theirs."""
    inside = products[np.ix_(rows, rows)]
    means = inside.mean(0, dtype=np.float64)
    return (inside - means - means[:, None] + means.mean()).astype(np.float32)


def tap_grams(problem: Problem, some: np.ndarray | None = None) -> tuple[Tensor, np.ndarray]:
    """The centred kernel of each tap over its mean diagonal, float32 [n_taps, n, n], and these diagonals.

    A tap whose features are the same for all images has a kernel of zeros, and an infinite diagonal.
    ``some``: the rows of which they are wanted.
    """
    n_taps, n_rows = len(problem.layout.taps), len(problem.labels if some is None else some)
    kernels, diagonals = torch.empty(n_taps, n_rows, n_rows), np.full(n_taps, np.inf)
    for tap, kernel in enumerate(kernels):
        products = tap_products(problem, tap)
        kernel.copy_(torch.from_numpy(products if some is None else of_rows(products, some)))
        mean = float(kernel.diagonal().double().mean())
        if mean > CONSTANT:
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
        narrow = inverse.float()  # half the time, and kernels are no finer
        by_kernel = -(inverse @ by_dual).float() @ dual.T.float() - (narrow * by_diagonal.float()) @ narrow
        by_weights = kernels.view(len(kernels), -1) @ by_kernel.view(-1)
        by_weights = by_weights.double() * weights
        by_weights -= weights * by_weights.sum()
        by_ridge = by_ridge + ridge * by_kernel.diagonal().sum()
    gradient = np.concatenate([by_weights.numpy(), [float(by_ridge), float(by_scale)]])
    return float(loss.detach()), gradient, outputs.detach()


def _factor(kernels: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of K + l I, float64 [n, n]."""
    kernel = _mixed(kernels, weights)
    kernel.diagonal().add_(ridge)
    return torch.linalg.cholesky(kernel)


def _mixed(kernels: Tensor, weights: Tensor) -> Tensor:
    """K, float64 [n, n]."""
    n_rows = kernels.shape[1]
    return torch.mv(kernels.view(len(kernels), -1).T, weights.float()).view(n_rows, n_rows).double()
