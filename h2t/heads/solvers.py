"""Heads that are solved for and not trained step by step: the baselines that readers will ask for.

All but those on tap kernels are invariant under rotations of the features. So with more features than rows,
which always lie in a space of as many dimensions as there are rows, they are solved there, exactly, and cost
seconds.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from h2t.heads.neighbours import Neighbours
from h2t.heads.solution import ABSENT, Problem, Solution
from h2t.heads.tap_kernels import tap_kernels

Solver = Callable[[Problem, Sequence[float]], Iterator[Solution]]
"""From a problem and ascending coefficients to a solution for each."""

RIDGE_COEFFICIENTS = tuple(10.0**power for power in range(-6, 6))


def prototypes(problem: Problem, coefficients: Sequence[float]) -> Iterator[Solution]:
    """Nearest class mean: the class whose mean of the features is the nearest (Euclidean)."""
    features, labels, n_classes = problem.features, problem.labels, problem.n_classes
    weight = np.zeros((features.shape[1], n_classes), np.float32)
    bias = np.full(n_classes, ABSENT, np.float32)
    for label in np.unique(labels):
        weight[:, label] = features[labels == label].mean(0)
        bias[label] = -np.square(weight[:, label]).sum() / 2
    for _ in coefficients:
        yield Solution(weight, bias)


def ridge(problem: Problem, coefficients: Sequence[float]) -> Iterator[Solution]:
    """Ridge regression of the one-hot labels; exact leave-one-out errors choose the penalty.

    Of ``RIDGE_COEFFICIENTS``: each stated coefficient would be one more choice, which nothing needs.
    """
    from sklearn.linear_model import RidgeCV

    labels, n_classes = problem.labels, problem.n_classes
    rotated, axes = _rotated(problem.features)
    targets = np.eye(n_classes)[labels]
    model = RidgeCV(alphas=RIDGE_COEFFICIENTS).fit(rotated, targets)
    present = np.isin(np.arange(n_classes), labels)
    for _ in coefficients:
        yield _solution(axes, model.coef_, model.intercept_, present)


def logistic(problem: Problem, coefficients: Sequence[float]) -> Iterator[Solution]:
    """Multinomial logistic regression with the penalty coefficient / 2 · ΣW² on the summed loss, by L-BFGS.

    Each coefficient starts from zero, so that it gives the same whichever others are tried.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    labels, n_classes = problem.labels, problem.n_classes
    rotated, axes = _rotated(problem.features)
    classes = np.unique(labels)
    present = np.isin(np.arange(n_classes), classes)
    for coefficient in coefficients:
        model = LogisticRegression(C=1 / coefficient, max_iter=1000)
        with warnings.catch_warnings():  # without a penalty to speak of it need not converge, and may do well
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(rotated, labels)
        coef, intercept = model.coef_, model.intercept_
        if len(classes) == 2:  # of which scikit-learn describes the second alone
            coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
        weights, biases = np.zeros((n_classes, coef.shape[1])), np.zeros(n_classes)
        weights[present], biases[present] = coef, intercept
        yield _solution(axes, weights, biases, present)


def nearest_neighbours(problem: Problem, coefficients: Sequence[float]) -> Iterator[Solution]:
    """Votes of the training rows of the largest cosine; a coefficient is their number k (at least 1).

    Rows have unit norm per tap, so that one factor makes cosines of the products.
    """
    features, labels, n_classes = problem.features, problem.labels, problem.n_classes
    norms = np.linalg.norm(features, axis=1)
    scale = norms * norms.max(initial=0.0)
    weight = np.ascontiguousarray((features / np.where(scale > 0, scale, 1.0)[:, None]).T, np.float32)
    bias = np.zeros(len(labels), np.float32)
    for k in coefficients:
        yield Solution(weight, bias, Neighbours(max(int(k), 1), labels.astype(np.int64), n_classes))


SOLVERS: dict[str, Solver] = {
    "prototype": prototypes,
    "ridge": ridge,
    "logistic": logistic,
    "knn": nearest_neighbours,
    "tap_kernels": tap_kernels,
}


def _rotated(features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows in the space that they span, float64 [n, rank], and its axes [rank, n_features]; None: as given.

    By the eigenvectors of the n x n matrix of their products. Directions in which rounding alone is left are
    dropped.
    """
    rows = features.astype(np.float64)
    if len(rows) >= rows.shape[1]:
        return rows, None
    values, vectors = np.linalg.eigh(rows @ rows.T)
    held = values > values[-1] * len(rows) * np.finfo(np.float32).eps
    lengths = np.sqrt(values[held])
    return vectors[:, held] * lengths, (vectors[:, held] / lengths).T @ rows


def _solution(
    axes: np.ndarray | None, weights: np.ndarray, biases: np.ndarray, present: np.ndarray
) -> Solution:
    """In the original space, from weights [n_classes, rank]."""
    weight = weights if axes is None else weights @ axes
    biases = np.where(present, biases, ABSENT)
    return Solution(np.ascontiguousarray(weight.T, np.float32), biases.astype(np.float32))
