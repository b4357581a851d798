"""The hyperparameters that cross-validation chooses."""

from collections.abc import Iterable

import pandas as pd

from h2t.errors import UserError
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from pipelines.artifacts import chosen_from_trials, heads, required
from pipelines.products import Files
from pipelines.run_directory import RunDirectory
from pipelines.schemas import POINT
from pipelines.task_data import TaskData


def choose(trials: pd.DataFrame) -> pd.DataFrame:
    """Choose the point with the highest mean validation accuracy for each (backbone, task, method).

    ``trials``: columns as in ``schemas.TRIALS``, folds of a point in any order. Ties go to the lower mean
    validation loss, then to the point that comes first. Returns columns as in ``schemas.CHOSEN``.
    """
    keys = ["backbone", "task", "group"]
    done = trials[trials["status"] == "done"]
    means = done.groupby([*keys, *POINT], sort=False).agg(
        validation_std=("validation_accuracy", "std"),
        validation_accuracy=("validation_accuracy", "mean"),
        validation_loss=("validation_loss", "mean"),
        n_folds=("fold", "nunique"),
    )
    means = means.reset_index()
    best = means.sort_values(
        ["validation_accuracy", "validation_loss"], ascending=[False, True], kind="stable"
    )
    chosen = best.groupby([*keys, "method"], sort=False).head(1)
    counts = means.groupby([*keys, "method"]).size().rename("n_candidates").reset_index()
    chosen = chosen.merge(counts, on=[*keys, "method"])
    rank = {name: position for position, name in enumerate(METHODS)}
    return chosen.sort_values("method", key=lambda names: names.map(rank)).reset_index(drop=True)


def without_diverged(trials: pd.DataFrame) -> pd.DataFrame:
    """Leave out points that diverged on some fold, where the method has points that did not.

    Raises UserError when every training of a task and method diverged.
    """
    for (task, method), group in trials.groupby(["task", "method"]):
        if (group["status"] == "failed").all():
            steps = ", ".join(
                f"rate {row['learning_rate']:g} at step {row['diverged_at']}" for _, row in group.iterrows()
            )
            raise UserError(
                f"{task}: the loss of {method} was not finite in any training ({steps}); lower "
                "finetune.learning_rate"
            )
    finite = trials.groupby(POINT)["status"].transform(lambda statuses: (statuses == "done").all())
    any_finite = finite.groupby(trials["method"]).transform("any")
    return trials[finite | ~any_finite]


def best_of(method: str, chosen: pd.DataFrame) -> pd.DataFrame:
    """The row of a method that is the best of others: what validated best; ties go to the first named."""
    rank = {name: position for position, name in enumerate(METHODS[method].best_of)}
    candidates = chosen[chosen["method"].isin(rank)]
    candidates = candidates.sort_values("method", key=lambda names: names.map(rank))
    best = candidates.sort_values("validation_accuracy", ascending=False, kind="stable").head(1)
    return best.assign(source=best["method"], method=method, n_candidates=len(candidates))


def read_chosen(run: RunDirectory, name: str, methods: Iterable[str]) -> list[Hyperparameters]:
    """The chosen points of some methods from a file of choices."""
    frame = run.read_frame([name])
    rows = frame[frame["method"].isin(set(methods))][POINT].to_dict("records")
    return [Hyperparameters(**{str(name): value for name, value in row.items()}) for row in rows]


def final_heads(run: RunDirectory, task: TaskData) -> Files:
    """The final heads of a task, of its methods on frozen features; needs the choices of the sweep."""
    points: list[Hyperparameters] = []
    for choices in chosen_from_trials(task).units:
        points += read_chosen(run, required(run, choices, "sweep"), task.config.methods)
    return heads(task, points)
