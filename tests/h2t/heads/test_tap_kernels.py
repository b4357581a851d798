"""Ridge regression on tap kernels: exact leave-one-out, exact gradients, the same head by features."""

import numpy as np
import pytest
import torch

from h2t.features import FeatureLayout, unit_norm
from h2t.heads.solution import Problem
from h2t.heads.tap_kernels import learn_mixture, leave_one_out, tap_grams, tap_kernels

LAYOUT = FeatureLayout(("noise", "signal", "more noise"), (40, 30, 20))
PARAMETERS = np.log(np.array([0.3, 0.3, 0.4, 0.2, 4.0]))  # of weights that add up to 1


def example(n_rows: int = 60, n_classes: int = 3) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Features of unit norm per tap, of which the second tells the classes apart; labels; targets."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, n_classes, n_rows)
    features = generator.normal(size=(n_rows, LAYOUT.n_features)).astype(np.float32)
    features[:, 40:70] += 0.5 * generator.normal(size=(n_classes, 30))[labels]
    return unit_norm(features, LAYOUT), labels, torch.from_numpy(np.eye(n_classes)[labels])


def test_outputs_are_those_of_a_fit_without_the_image() -> None:
    features, _, targets = example()
    kernels, _ = tap_grams(features, LAYOUT)
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
    kernels, _ = tap_grams(features, LAYOUT)
    _, gradient, _ = leave_one_out(kernels, targets, PARAMETERS)
    for number, step in enumerate(1e-3 * np.eye(5)):
        above, below = (leave_one_out(kernels, targets, PARAMETERS + sign * step)[0] for sign in (1, -1))
        assert gradient[number] == pytest.approx((above - below) / 2e-3, rel=0.01, abs=1e-4)


def test_the_tap_that_tells_classes_apart_is_found_and_the_head_reads_features() -> None:
    features, labels, targets = example(200)
    kernels, diagonals = tap_grams(features, LAYOUT)
    mixture = learn_mixture(kernels, targets)
    assert mixture.weights[1] > 3 * max(mixture.weights[0], mixture.weights[2])
    assert 0.6 < mixture.accuracy < 1
    (solution,) = tap_kernels(Problem(features, labels, 3, LAYOUT), [0.0])
    kernel = (kernels.double() * torch.from_numpy(mixture.weights)[:, None, None]).sum(0)
    dual = torch.linalg.solve(kernel + mixture.ridge * torch.eye(200), targets - targets.mean(0))
    expected = mixture.scale * (targets.mean(0) + kernel @ dual).numpy()
    np.testing.assert_allclose(features @ solution.weight + solution.bias, expected, rtol=1e-3, atol=1e-2)
    assert len(diagonals) == 3


def test_a_tap_that_never_changes_takes_no_part() -> None:
    features, labels, _ = example()
    features[:, :40] = 0.1
    (solution,) = tap_kernels(Problem(features, labels, 3, LAYOUT), [0.0])
    assert np.isfinite(solution.weight).all()
    assert (solution.weight[:40] == 0).all()
