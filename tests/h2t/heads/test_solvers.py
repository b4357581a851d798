"""Heads that are solved for, against scikit-learn on all features and by what must hold."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from h2t.features import FeatureLayout, unit_norm
from h2t.heads.neighbours import TEMPERATURE
from h2t.heads.solution import ABSENT, Problem
from h2t.heads.solvers import (
    RIDGE_COEFFICIENTS,
    SOLVERS,
    logistic,
    nearest_neighbours,
    prototypes,
    ridge,
)


def example(n_rows: int = 60, n_features: int = 200, n_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.arange(n_rows) % n_classes
    features = (
        generator.normal(size=(n_rows, n_features)) + generator.normal(size=(n_classes, n_features))[labels]
    )
    return features.astype(np.float32), labels


def problem(features: np.ndarray, labels: np.ndarray, n_classes: int) -> Problem:
    """Of two taps."""
    width = features.shape[1] // 2
    return Problem.of(
        features, labels, n_classes, FeatureLayout(("a", "b"), (width, features.shape[1] - width))
    )


@pytest.mark.parametrize("n_features", [20, 200])
def test_prototypes_are_the_nearest_class_means(n_features: int) -> None:
    features, labels = example(n_features=n_features)
    ((weight, bias, *_),) = prototypes(problem(features, labels, 4), [0.0])
    means = np.stack([features[labels == label].mean(0) for label in range(4)])
    np.testing.assert_array_equal((features @ weight + bias).argmax(1), cdist(features, means).argmin(1))


@pytest.mark.parametrize("n_features", [20, 200])
@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("coefficient", [0.1, 10.0])
def test_logistic_regression_is_that_on_all_features(
    n_features: int, n_classes: int, coefficient: float
) -> None:
    features, labels = example(n_features=n_features, n_classes=n_classes)
    ((weight, bias, *_),) = logistic(problem(features, labels, n_classes), [coefficient])
    direct = LogisticRegression(C=1 / coefficient, max_iter=5000, tol=1e-8).fit(features, labels)
    logits, scores = features @ weight + bias, direct.decision_function(features)
    ours = logits[:, 1] - logits[:, 0] if n_classes == 2 else logits - logits.mean(1, keepdims=True)
    theirs = scores if n_classes == 2 else scores - scores.mean(1, keepdims=True)
    assert np.abs(ours - theirs).max() < 0.06 * np.abs(theirs).max()


@pytest.mark.parametrize("n_features", [20, 200])
def test_ridge_has_the_least_of_the_exact_leave_one_out_errors(n_features: int) -> None:
    features, labels = example(n_features=n_features)
    ((weight, bias, *_),) = ridge(problem(features, labels, 4), [0.0])
    targets, errors = np.eye(4)[labels], {}
    for penalty in RIDGE_COEFFICIENTS:
        left_out = []
        for row in range(len(features)):
            others = np.arange(len(features)) != row
            model = Ridge(penalty).fit(features[others].astype(float), targets[others])
            left_out.append(np.square(model.predict(features[row : row + 1]) - targets[row]).mean())
        errors[penalty] = np.mean(left_out)
    fits = {p: Ridge(p).fit(features.astype(float), targets).predict(features) for p in RIDGE_COEFFICIENTS}
    chosen = min(fits, key=lambda penalty: np.abs(fits[penalty] - (features @ weight + bias)).max())
    np.testing.assert_allclose(features @ weight + bias, fits[chosen], atol=1e-3)
    assert chosen == min(errors, key=lambda penalty: errors[penalty])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_class_without_rows_is_never_predicted_and_company_changes_nothing(solver: str) -> None:
    features, labels = example(n_classes=3)
    labels = np.where(labels == 2, 4, labels)
    (solution,) = SOLVERS[solver](problem(features, labels, 6), [2.0])
    assert solution.weight.dtype == solution.bias.dtype == np.float32
    several = list(SOLVERS[solver](problem(features, labels, 6), [1.0, 2.0]))
    np.testing.assert_array_equal(several[1].weight, solution.weight)
    outputs = features @ solution.weight + solution.bias
    if solution.neighbours:
        outputs = solution.neighbours.logits(outputs)
    else:
        assert (solution.bias[[2, 3, 5]] == ABSENT).all()
    assert outputs.shape == (len(labels), 6)
    assert set(outputs.argmax(1)) == {0, 1, 4}


@pytest.mark.parametrize("n_taps", [1, 3])
@pytest.mark.parametrize("k", [1, 5, 1000])
def test_neighbours_vote_as_in_scikit_learn(n_taps: int, k: int) -> None:
    features, labels = example()
    layout = FeatureLayout(
        tuple("abc"[:n_taps]), (200 // n_taps,) * (n_taps - 1) + (200 - 200 // n_taps * (n_taps - 1),)
    )
    rows = unit_norm(features, layout)
    (solution,) = nearest_neighbours(problem(rows[:40], labels[:40], 5), [k])
    weight, bias, neighbours = solution[:3]
    assert neighbours is not None
    shares = np.exp(neighbours.logits(rows[40:] @ weight + bias))
    theirs = KNeighborsClassifier(
        min(k, 40), metric="cosine", weights=lambda distances: np.exp((1 - distances) / TEMPERATURE)
    )
    expected = theirs.fit(rows[:40], labels[:40]).predict_proba(rows[40:])
    np.testing.assert_allclose(shares[:, :4], expected, atol=1e-4)
    assert (shares[:, 4] < 1e-6).all()  # a class without training rows
