"""Result rows of the methods that train the backbone, in the columns of the frozen ones."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from h2t.costs import BackboneCost, HeadSize, storage_bytes, training_flops
from h2t.finetuning import model_content
from h2t.metrics import correct
from pipelines.evaluate import prediction_column
from pipelines.extract import read_manifest
from pipelines.finetune_trial import TrainedTrial
from pipelines.run_directory import RunDirectory
from pipelines.task_data import TaskData, backbone_folder


def write_trained_results(
    work: TaskData,
    final: list[TrainedTrial],
    prediction_files: Iterable[str],
    selected_file: str,
    run: RunDirectory,
) -> None:
    """Result rows of one task from adapted models and predictions; Head2Toe-FT+ copies those it chose."""
    models = [trial.file for trial in final]
    folder = f"{work.folder('results')}/kind=trained"
    # Head2Toe-FT+ may copy rows of frozen heads, which have seeds of their own.
    name = work.file("results", "trained", "results.parquet", models, selected_file, work.config.seeds)
    missing, _ = run.reconcile(folder, [name] if final else [])
    if not missing:
        return
    selected = run.read_frame([selected_file]).set_index("method")
    predictions = run.read_frame(prediction_files)
    cost = BackboneCost(**read_manifest(work, run)["cost"])
    rows = [_result(work, trial, predictions, selected, cost, run) for trial in final]
    if "head2toe_ft_plus" in work.config.methods:
        rows += _plus(work, rows, selected, run)
    run.write_frame(name, pd.DataFrame(rows))


def _result(
    work: TaskData,
    trial: TrainedTrial,
    predictions: pd.DataFrame,
    selected: pd.DataFrame,
    cost: BackboneCost,
    run: RunDirectory,
) -> dict[str, Any]:
    settings, config = trial.settings, work.config
    content = model_content(run.read(trial.file))
    predicted = predictions[prediction_column(settings.method, trial.seed)].to_numpy()
    n_correct, n_test = correct(predictions["label"].to_numpy(), predicted), len(predicted)
    size = HeadSize(content["n_features"], content["n_kept"], work.n_classes)
    steps = trial.frozen.steps if trial.frozen else settings.steps
    counts = {"n_images": len(work.labels["train"]), "batch_size": config.finetune.batch_size}
    done = content["status"] == "done"
    return {
        "backbone": backbone_folder(config),
        "task": work.task.name,
        "group": work.task.group,
        "method": settings.method,
        "seed": trial.seed,
        "test_accuracy": n_correct / n_test if done else float("nan"),
        "n_test": n_test,
        "n_correct": n_correct if done else 0,
        "n_train": len(work.labels["train"]),
        "n_classes": work.n_classes,
        "n_features": content["n_features"],
        "n_kept": content["n_kept"],
        "target_size": settings.target_size,
        "learning_rate": settings.learning_rate,
        "steps": settings.steps,
        "coefficient": settings.coefficient,
        "keep_fraction": settings.keep_fraction,
        "validation_accuracy": float(selected["validation_accuracy"][settings.method]),
        "train_seconds": content["seconds"],
        "peak_memory_bytes": content["peak_memory_bytes"],
        "modelled_flops": training_flops(
            settings.method, cost, size, steps, finetuning_steps=settings.steps, **counts
        ),
        "modelled_storage_bytes": storage_bytes(settings.method, cost, size),
        "image_source": config.task_images(work.task.name).format,
        "preprocessing": f"{config.backbone.resize}, {config.backbone.normalization}",
        "fold_scheme": config.cross_validation.scheme,
        "weights": content["weights"],
        "status": content["status"],
        "fingerprint": work.fingerprint,
        "train_loss": content["train_loss"],
        "diverged_at": content["diverged_at"] or 0,
    }


def _plus(
    work: TaskData, trained: list[dict[str, Any]], selected: pd.DataFrame, run: RunDirectory
) -> list[dict[str, Any]]:
    """The rows of Head2Toe or of Head2Toe-FT, whichever validated better, under the name of Head2Toe-FT+."""
    (chosen,) = selected.loc[["head2toe_ft_plus"]].to_dict("records")
    rows = [row for row in trained if row["method"] == "head2toe_ft"]
    if chosen["source"] == "head2toe":
        frozen = run.read_frame(run.names(f"{work.folder('results')}/kind=frozen"))
        rows = [dict(row) for _, row in frozen[frozen["method"] == "head2toe"].iterrows()]
    changed = {"method": "head2toe_ft_plus", "validation_accuracy": float(chosen["validation_accuracy"])}
    return [{**row, **changed} for row in rows]
