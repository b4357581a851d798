"""The choice of hyperparameters: means over folds, ties, and methods that are the best of others."""

from typing import Any

import pandas as pd
import pytest

from h2t.methods import METHODS
from pipelines.choice import best_of, choose, without_diverged


def trial(rate: float, fold: int, accuracy: float, loss: float = 1.0, **changes: Any) -> dict[str, Any]:
    return {
        "backbone": "b", "task": "t", "group": "natural", "method": "linear", "target_size": 16,
        "learning_rate": rate, "steps": 5, "coefficient": 0.0, "keep_fraction": 1.0, "offset": 0,
        "fold": fold,
        "status": "done", "validation_accuracy": accuracy, "validation_loss": loss, "diverged_at": 0,
        **changes,
    }  # fmt: skip


def chosen_rate(*rows: dict[str, Any]) -> float:
    (row,) = choose(pd.DataFrame(rows)).to_dict("records")
    return float(row["learning_rate"])


def test_the_mean_over_folds_decides() -> None:
    rows = [trial(0.1, 0, 0.9), trial(0.1, 1, 0.1), trial(0.01, 0, 0.6), trial(0.01, 1, 0.6)]
    (row,) = choose(pd.DataFrame(rows)).to_dict("records")
    assert row["learning_rate"] == 0.01
    assert row["validation_accuracy"] == pytest.approx(0.6)
    assert row["validation_std"] == 0
    assert (row["n_folds"], row["n_candidates"]) == (2, 2)


def test_ties_go_to_the_lower_loss_then_to_the_earlier_point() -> None:
    assert chosen_rate(trial(0.1, 0, 0.5, 1.0), trial(0.01, 0, 0.5, 0.9)) == 0.01
    assert chosen_rate(trial(0.1, 0, 0.5, 0.9), trial(0.01, 0, 0.5, 1.0)) == 0.1
    assert chosen_rate(trial(0.1, 0, 0.5), trial(0.01, 0, 0.5)) == 0.1
    assert chosen_rate(trial(0.01, 0, 0.5), trial(0.1, 0, 0.5)) == 0.01


def test_every_task_and_method_has_a_choice_of_its_own_in_the_order_of_the_methods() -> None:
    rows = [
        trial(rate, 0, accuracy, task=task, method=method)
        for task in ("t", "u")
        for method in ("head2toe", "linear")
        for rate, accuracy in ((0.1, 0.2), (0.01, 0.3 if task == "t" else 0.1))
    ]
    chosen = choose(pd.DataFrame(rows))
    assert set(chosen[chosen["task"] == "t"]["learning_rate"]) == {0.01}
    assert set(chosen[chosen["task"] == "u"]["learning_rate"]) == {0.1}
    assert chosen["method"].tolist() == ["linear", "linear", "head2toe", "head2toe"]


def test_a_point_that_diverged_on_a_fold_is_left_out_while_there_is_another() -> None:
    failed = trial(0.1, 1, float("nan"), status="failed", diverged_at=3)
    rows = pd.DataFrame([trial(0.1, 0, 0.9), failed, trial(0.01, 0, 0.5), trial(0.01, 1, 0.5)])
    assert choose(without_diverged(rows))["learning_rate"].tolist() == [0.01]
    assert choose(without_diverged(rows[:2]))["learning_rate"].tolist() == [0.1]


def test_the_best_of_others_keeps_the_first_named_on_a_tie() -> None:
    name = next(name for name, method in METHODS.items() if method.best_of)
    first, second = METHODS[name].best_of
    for accuracy, expected in ((0.5, first), (0.4, first), (0.6, second)):
        chosen = pd.DataFrame([
            {"method": second, "validation_accuracy": accuracy, "n_candidates": 4},
            {"method": first, "validation_accuracy": 0.5, "n_candidates": 8},
        ])  # fmt: skip
        (row,) = best_of(name, chosen).to_dict("records")
        assert (row["method"], row["source"], row["n_candidates"]) == (name, expected, 2)
