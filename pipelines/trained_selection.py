"""The settings that the cross-validation chooses for methods that train the backbone."""

import math
from dataclasses import asdict

import pandas as pd

from h2t.errors import UserError
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from pipelines.finetune_trial import TrainedTrial, frozen_for, trained_methods, trained_search_space
from pipelines.run_directory import RunDirectory
from pipelines.sweep import SETTINGS, select, selected_file
from pipelines.task_data import TaskData, backbone_folder


def trained_selected_file(work: TaskData, candidates: list[TrainedTrial]) -> str:
    """Where the chosen settings of the trained methods of a task lie."""
    config = work.config
    # With Head2Toe-FT+, which is chosen here, though it has no training of its own.
    methods = [method for method in config.methods if METHODS[method].trains_backbone]
    parts = [methods, config.finetune.learning_rate, config.finetune.steps]
    parts += [[trial.file for trial in candidates], selected_file(work)]
    return work.file("selected", "trained", "selected.parquet", *parts)


def write_trained_selected(
    work: TaskData, candidates: list[TrainedTrial], frozen: Hyperparameters | None, run: RunDirectory
) -> None:
    """Choose the settings of every trained method of a task, where that was not done yet.

    Raises UserError when the loss of no trial of a method was finite.
    """
    name = trained_selected_file(work, candidates)
    missing, _ = run.reconcile(name.rpartition("/")[0], [name] if trained_methods(work.config) else [])
    if not missing:
        return
    if work.config.finetune.folds == 0:
        chosen = _only_settings(work, frozen)
    else:
        rows = run.read_frame(trial.file for trial in candidates)
        _refuse_all_failed(rows)
        chosen = select(_without_diverged(rows))
    if "head2toe_ft_plus" in work.config.methods:
        pair = [run.read_frame([selected_file(work)]), chosen]
        chosen = pd.concat([chosen, _better(*pair)], ignore_index=True)
    run.write_frame(name, chosen)


def read_trained_selected(
    work: TaskData, candidates: list[TrainedTrial], run: RunDirectory
) -> list[Hyperparameters]:
    """The chosen settings of every method with a training of its own."""
    if not trained_methods(work.config):
        return []
    frame = run.read_frame([trained_selected_file(work, candidates)])
    rows = frame[frame["method"].isin(trained_methods(work.config))][SETTINGS]
    return [Hyperparameters(**{key: row[key] for key in SETTINGS}) for row in rows.to_dict("records")]


def _only_settings(work: TaskData, frozen: Hyperparameters | None) -> pd.DataFrame:
    """The one point of each method's search space, which no fold has validated."""
    nothing = {"validation_std": math.nan, "validation_accuracy": math.nan, "validation_loss": math.nan}
    place = {"backbone": backbone_folder(work.config), "task": work.task.name, "group": work.task.group}
    return pd.DataFrame(
        [
            {**place, **asdict(settings), **nothing, "n_folds": 0, "n_candidates": 1}
            for method in trained_methods(work.config)
            for settings in trained_search_space(work.config, method, frozen_for(method, frozen))
        ]
    )


def _refuse_all_failed(rows: pd.DataFrame) -> None:
    """Raise UserError when every training of a task and method diverged."""
    for (task, method), group in rows.groupby(["task", "method"]):
        if (group["status"] == "failed").all():
            steps = ", ".join(
                f"rate {row['learning_rate']:g} at step {row['diverged_at']}" for _, row in group.iterrows()
            )
            raise UserError(
                f"{task}: the loss of {method} was not finite in any training ({steps}); lower "
                "finetune.learning_rate"
            )


def _without_diverged(rows: pd.DataFrame) -> pd.DataFrame:
    """Leave out settings that diverged on some fold, where the method has settings that did not."""
    whole = rows.groupby(SETTINGS)["status"].transform(lambda statuses: (statuses == "done").all())
    choice = whole.groupby(rows["method"]).transform("any")
    return rows[whole | ~choice]


def _better(frozen: pd.DataFrame, trained: pd.DataFrame) -> pd.DataFrame:
    """Head2Toe-FT+: Head2Toe or Head2Toe-FT, whichever validated better; ties stay frozen."""
    pair = pd.concat([frozen[frozen["method"] == "head2toe"], trained[trained["method"] == "head2toe_ft"]])
    best = pair.sort_values("validation_accuracy", ascending=False, kind="stable").head(1)
    return best.assign(source=best["method"], method="head2toe_ft_plus", n_candidates=2)
