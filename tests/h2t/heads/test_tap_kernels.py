"""Ridge regression on tap kernels: exact leave-one-out, exact gradients, the same head by features."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from h2t.errors import UserError
from h2t.features import FeatureLayout, TapFeatures, keep_features, unit_norm
from h2t.folds import folds
from h2t.head2toe import fit
from h2t.heads.kernel_logistic import held_out_losses
from h2t.heads.solution import Problem, Solution
from h2t.heads.tap_kernels import (
    PENALTIES,
    StreamedWeights,
    held_out_outputs,
    kernel_head,
    learn_mixture,
    leave_one_out,
    of_rows,
    reweighted,
    tap_grams,
    tap_kernels,
    tap_products,
)
from h2t.hyperparameters import Hyperparameters

LAYOUT = FeatureLayout(("noise", "signal", "more noise"), (40, 30, 20))
PARAMETERS = np.log(np.array([0.3, 0.3, 0.4, 0.2, 4.0]))  # of weights that add up to 1


def example(n_rows: int = 60, n_classes: int = 3) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Features of unit norm per tap, of which the second tells the classes apart; labels; targets."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, n_classes, n_rows)
    features = generator.normal(size=(n_rows, LAYOUT.n_features)).astype(np.float32)
    features[:, 40:70] += 0.5 * generator.normal(size=(n_classes, 30))[labels]
    return unit_norm(features, LAYOUT), labels, torch.from_numpy(np.eye(n_classes)[labels])


def problem_of(features: np.ndarray) -> Problem:
    """One without labels, of which products alone are wanted."""
    return Problem.of(features, np.zeros(len(features), int), 3, LAYOUT)


def test_outputs_are_those_of_a_fit_without_the_image() -> None:
    features, _, targets = example()
    kernels, _ = tap_grams(problem_of(features))
    _, _, outputs = leave_one_out(kernels, targets, PARAMETERS)
    weights = torch.from_numpy(np.exp(PARAMETERS[:3]))
    kernel = (kernels.double() * weights[:, None, None]).sum(0).numpy()
    for image in (0, 17):
        others = np.delete(np.arange(len(features)), image)
        rows = kernel[np.ix_(others, others)]
        centre = np.eye(len(others)) - 1 / len(others)
        known = targets.numpy()[others]
        ridge = np.exp(PARAMETERS[3]) * np.eye(len(others))
        dual = np.linalg.solve(centre @ rows @ centre + ridge, known - known.mean(0))
        expected = known.mean(0) + (centre @ (kernel[image, others] - rows.mean(0))) @ dual
        np.testing.assert_allclose(outputs[image], expected, atol=1e-5)


def test_the_gradient_is_that_of_the_loss() -> None:
    features, _, targets = example()
    kernels, _ = tap_grams(problem_of(features))
    _, gradient, _ = leave_one_out(kernels, targets, PARAMETERS)
    for number, step in enumerate(1e-3 * np.eye(5)):
        above, below = (leave_one_out(kernels, targets, PARAMETERS + sign * step)[0] for sign in (1, -1))
        assert gradient[number] == pytest.approx((above - below) / 2e-3, rel=0.01, abs=1e-4)


def test_the_tap_that_tells_classes_apart_is_found() -> None:
    features, _, targets = example(200)
    mixture = learn_mixture(tap_grams(problem_of(features))[0], targets)
    assert mixture.weights[1] > 3 * max(mixture.weights[0], mixture.weights[2])
    assert mixture.weights.sum() == pytest.approx(1)
    assert 0.6 < mixture.accuracy < 1


def logistic_regression(features: np.ndarray, labels: np.ndarray, penalty: float) -> np.ndarray:
    """Outputs of scikit-learn's, less their means over classes."""
    model = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=5000).fit(features, labels)
    outputs = model.decision_function(features)
    return outputs - outputs.mean(1, keepdims=True)


def outputs_of(solution: Solution, features: np.ndarray) -> np.ndarray:
    outputs = features @ solution.weight + solution.bias
    return outputs - outputs.mean(1, keepdims=True)


def test_the_head_is_logistic_regression_on_features_weighed_by_tap() -> None:
    features, labels, targets = example(200)
    (solution,) = tap_kernels(Problem.of(features, labels, 3, LAYOUT), [0.0])
    kernels, diagonals = tap_grams(problem_of(features))
    weights = learn_mixture(kernels, targets).weights
    kernel = (kernels.double() * torch.from_numpy(weights)[:, None, None]).sum(0).numpy()
    penalty = PENALTIES[held_out_losses(kernel, targets.numpy(), PENALTIES).argmin()]
    weighed = features * np.sqrt(np.repeat(weights / diagonals, LAYOUT.widths))
    expected = logistic_regression(weighed, labels, penalty)
    assert np.abs(outputs_of(solution, features) - expected).max() < 0.02 * np.abs(expected).max()


def test_held_out_losses_are_those_of_heads_on_the_other_folds() -> None:
    features, labels, targets = example(200)
    features -= features.mean(0)
    kernel = (features @ features.T).astype(float) / 3
    losses = held_out_losses(kernel, targets.numpy(), [0.1, 0.001])
    for penalty, loss in zip([0.1, 0.001], losses, strict=True):
        shares = np.concatenate([
            LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=5000)
            .fit(features[rows] / 3**0.5, labels[rows])
            .predict_log_proba(features[held] / 3**0.5)
            for rows, held in folds(200)
        ])  # fmt: skip
        assert loss == pytest.approx(-shares[np.arange(200), labels].mean(), rel=1e-3)


def test_a_tap_that_never_changes_takes_no_part() -> None:
    features, labels, _ = example()
    features[:, :40] = 0.1
    (solution,) = tap_kernels(Problem.of(features, labels, 3, LAYOUT), [0.0])
    assert np.isfinite(solution.weight).all()
    assert (solution.weight[:40] == 0).all()
    solution = reweighted(
        Problem.of(features[:, :40], labels, 3, LAYOUT.of_kept(np.arange(40))), np.ones(40), 1
    )
    assert (solution.weight == 0).all()
    assert solution.bias.argmax() == np.bincount(labels).argmax()


def test_reweighting_moves_weight_to_the_features_that_contribute() -> None:
    features, labels, _ = example(200)
    problem = Problem.of(features, labels, 3, LAYOUT)
    shares = []
    for solution in tap_kernels(problem, [0.0, 1.0, 3.0]):
        expected = np.linalg.norm(solution.weight, axis=1) * features.std(0)
        np.testing.assert_allclose(solution.contributions, expected, rtol=1e-3, atol=1e-6)
        sizes = np.sort(expected)[::-1]
        shares.append(sizes[:9].sum() / sizes.sum())
    assert 0.1 < shares[0] < shares[1] < shares[2] <= 1
    (again,) = tap_kernels(problem, [3.0])
    np.testing.assert_array_equal(again.weight, solution.weight)


def test_features_that_hardly_vary_cost_no_digits() -> None:
    features, labels, _ = example(200)
    features = np.float32(0.2) + np.float32(1e-4) * features
    solution = reweighted(Problem.of(features, labels, 3, LAYOUT), np.ones(LAYOUT.n_features), 0.01)
    weighed = features.astype(float) - features.mean(0, dtype=float)
    weighed /= np.sqrt(np.square(weighed).sum(1).mean())
    expected = logistic_regression(weighed, labels, 0.01)
    assert np.abs(outputs_of(solution, features) - expected).max() < 0.02 * np.abs(expected).max()


def test_kept_are_the_highest_contributions_which_weigh_the_features_of_the_head() -> None:
    features, labels, _ = example(200)
    points = [Hyperparameters("tap_kernels", 0, 0.0, 0, 1.0)]
    points += [Hyperparameters("tap_kernels_kept", 0, 0.0, 0, 1.0, share) for share in (0.1, 0.5)]
    found = fit(features, labels, LAYOUT, points, n_classes=3, embedding="signal", seeds=(0,))
    heads = {head.hyperparameters: head for head in found}
    inputs = unit_norm(features, LAYOUT)
    sizes = np.linalg.norm(heads[points[0]].weight, axis=1) * inputs.std(0)
    for point, n_kept in zip(points[1:], (9, 45), strict=True):
        head = heads[point]
        assert set(head.kept) == set(np.argsort(-sizes)[:n_kept])
        rows = keep_features(features, LAYOUT, head.kept)
        shares = sizes[head.kept] / sizes[head.kept].sum()
        weighed = (rows - rows.mean(0)) / rows.std(0) * np.sqrt(shares)
        fits = [logistic_regression(weighed, labels, penalty) for penalty in PENALTIES]
        outputs = outputs_of(Solution(head.weight, head.bias), rows)
        assert min(np.abs(outputs - fit).max() / np.abs(fit).max() for fit in fits) < 0.02
    assert np.mean(LAYOUT.tap_of(heads[points[1]].kept) == 1) > 0.7


def test_products_alone_give_the_outputs_of_the_head_and_its_weights() -> None:
    features, labels, _ = example(200)
    rows, held = np.arange(20, 200), np.arange(20)
    whole = Problem.of(features, labels, 3, LAYOUT)
    known = [tap_products(whole, tap) for tap in range(3)]

    def products(tap: int) -> np.ndarray:
        return of_rows(known[tap], rows)

    part = Problem.of(features[rows], labels[rows], 3, LAYOUT)
    (expected,) = tap_kernels(part, [0.0])
    head = kernel_head(replace(part, products=products))
    outputs = held_out_outputs(head, known.__getitem__, rows, held)
    scale = np.abs(outputs_of(expected, features[held])).max()
    np.testing.assert_allclose(
        outputs - outputs.mean(1, keepdims=True), outputs_of(expected, features[held]), atol=0.01 * scale
    )
    streamed = StreamedWeights(head, LAYOUT)
    for start in range(0, len(rows), 50):
        batch = slice(start, min(start + 50, len(rows)))
        for tap, columns in enumerate(LAYOUT.slices):
            streamed.add(tap, batch, features[rows[batch], columns])
    np.testing.assert_allclose(
        outputs_of(streamed.solution(), features[held]), outputs - outputs.mean(1, keepdims=True),
        atol=1e-3 * scale,
    )  # fmt: skip


def test_of_many_images_some_choose_the_weights_and_all_make_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, labels, _ = example(300)
    problem = Problem.of(features, labels, 3, LAYOUT)
    (whole,) = tap_kernels(problem, [0.0])
    monkeypatch.setattr("h2t.heads.tap_kernels.MIXTURE_ROWS", 150)
    head = kernel_head(problem)
    chosen = np.linspace(0, 299, 150).round().astype(int)
    some = Problem.of(features[chosen], labels[chosen], 3, LAYOUT)
    np.testing.assert_allclose(head.factors, kernel_head(some).factors, rtol=1e-3)
    assert head.kernel.shape == (300, 300)
    (solution,) = tap_kernels(problem, [0.0])
    accuracy, expected = (
        (outputs_of(member, features).argmax(1) == labels).mean() for member in (solution, whole)
    )
    assert accuracy == pytest.approx(expected, abs=0.05)
    monkeypatch.setattr("h2t.heads.tap_kernels.MOST_ROWS", 299)
    with pytest.raises(UserError, match="300 training images; expected at most 299"):
        next(tap_kernels(problem, [0.0]))


class Counted(TapFeatures):
    """Features of which it counts what is read."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.layout = values, LAYOUT
        self.taps: list[int] = []

    def read(self, tap: int) -> np.ndarray:
        self.taps.append(tap)
        return self.values[:, LAYOUT.slices[tap]]


def test_features_are_read_tap_by_tap_once_for_the_products_and_once_a_round() -> None:
    features, labels, _ = example()
    points = [Hyperparameters("tap_kernels", 0, 0.0, 0, rounds) for rounds in (0.0, 2.0)]
    counted = Counted(features)
    options = {"n_classes": 3, "embedding": "signal"}
    ours = list(fit(counted, labels, LAYOUT, points, **options))  # type: ignore[arg-type]
    assert counted.taps == 4 * [0, 1, 2]
    theirs = list(fit(features, labels, LAYOUT, points, **options))  # type: ignore[arg-type]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.weight, other.weight)
