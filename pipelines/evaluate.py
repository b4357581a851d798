"""Stage 3: final heads on all training images (Ray tasks), then test images through all of them (Ray Data).

The test split is read here alone, once: image → backbone → features → logits of every head of every
method and seed → predictions. Test features are never stored.
"""

import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
import torch
from rich.console import Console

from h2t.adapter import load_head, save_head
from h2t.costs import BackboneCost, HeadSize, storage_bytes, training_flops
from h2t.head2toe import Head, HeadBank
from h2t.hyperparameters import Hyperparameters
from h2t.images.formats import class_names
from h2t.metrics import correct
from pipelines.backbone_actor import FeatureReader
from pipelines.cluster import Cluster, trial_resources
from pipelines.config import Config
from pipelines.extract import read_manifest
from pipelines.feature_files import read_features
from pipelines.progress import StageProgress
from pipelines.run_directory import RunDirectory
from pipelines.shard_stream import process_shards, user_cause
from pipelines.sweep import fit_heads, read_selected, rows_of, selected_file
from pipelines.task_data import Shard, TaskData, backbone_folder


def evaluate(
    config: Config, works: Sequence[TaskData], run: RunDirectory, cluster: Cluster, console: Console
) -> int:
    """Train the final heads, predict the test images and write the result rows; how many images were read."""
    works = [work for work in works if work.trials()]
    if not works:
        console.print(f"{'evaluate':<9} nothing to do: no method on frozen features")
        return 0
    run.require((selected_file(work) for work in works), "sweep")
    chosen = {work.task.name: read_selected(work, run) for work in works}
    train_final_heads(works, chosen, run, cluster, console)
    n_images = predict_test_images(config, works, chosen, run, cluster, console)
    for work in works:
        write_results(work, chosen[work.task.name], run)
    return n_images


def train_final_heads(
    works: Sequence[TaskData],
    chosen: dict[str, list[Hyperparameters]],
    run: RunDirectory,
    cluster: Cluster,
    console: Console,
) -> None:
    """Train the chosen settings on all training images with every seed, where the head is missing."""
    pending = []
    for work in works:
        missing, _ = run.reconcile(
            f"{work.folder('heads')}/kind=frozen", _all_heads(work, chosen[work.task.name])
        )
        pending += _head_jobs(work, chosen[work.task.name], set(missing))
    if not pending:
        console.print(f"{'heads':<9} nothing to do: all heads are there")
        return
    resources = trial_resources(cluster, works[0].config.resources)
    options = {"num_cpus": max(resources["cpu"], cluster.cpus / cluster.cores if cluster.local else 0),
               "num_gpus": resources["gpu"]}  # fmt: skip
    total = sum(len(settings) for _, settings in pending) * len(works[0].config.seeds)
    with StageProgress(console, "heads", total, "heads") as progress:
        jobs = {
            _train_heads.options(**options).remote(work, settings, run): work for work, settings in pending
        }
        while jobs:
            (finished,), _ = ray.wait(list(jobs), num_returns=1)
            try:
                progress.advance(ray.get(finished), jobs.pop(finished).task.name)
            except ray.exceptions.RayError as error:
                raise user_cause(error) from error


def _all_heads(work: TaskData, chosen: list[Hyperparameters]) -> list[str]:
    return [work.head_file(settings, seed) for settings in chosen for seed in work.config.seeds]


def _head_jobs(
    work: TaskData, chosen: list[Hyperparameters], missing: set[str]
) -> list[tuple[TaskData, list[Hyperparameters]]]:
    """Hyperparameters of which a head is missing, grouped by target size (they share the feature matrix)."""
    grouped: dict[int, list[Hyperparameters]] = {}
    for settings in chosen:
        if any(work.head_file(settings, seed) in missing for seed in work.config.seeds):
            grouped.setdefault(settings.target_size, []).append(settings)
    return [(work, settings) for settings in grouped.values()]


# The process ends with the task: an idle one would hold its memory, and its GPU's, beside the actors to come.
@ray.remote(max_retries=2, max_calls=1)
def _train_heads(work: TaskData, chosen: list[Hyperparameters], run: RunDirectory) -> int:
    torch.set_num_threads(work.config.resources.cpus_per_trial)
    matrix = read_features(run, work.feature_files("train", chosen[0].target_size))
    rows = rows_of(matrix, work.row_order("train"))
    started = time.perf_counter()
    heads = list(fit_heads(work, matrix, rows, chosen, work.config.seeds))
    seconds = (time.perf_counter() - started) / len(heads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for head in heads:
        provenance = {
            "backbone": work.config.backbone.model_dump_json(),
            "task": work.task.name,
            "train_seconds": f"{seconds:.3f}",
            "peak_memory_bytes": str(peak),
        }
        with run.writing(work.head_file(head.settings, head.seed)) as sink:
            save_head(head, sink, provenance=provenance, classes=class_names(work.source) or work.n_classes)
    return len(heads)


def predictions_file(work: TaskData, chosen: list[Hyperparameters], shard: Shard) -> str:
    """Where the predictions of all frozen heads for one shard of test images lie."""
    return work.file("predictions", "frozen", f"part-{shard.number:05d}.parquet", _all_heads(work, chosen))


def predict_test_images(
    config: Config,
    works: Sequence[TaskData],
    chosen: dict[str, list[Hyperparameters]],
    run: RunDirectory,
    cluster: Cluster,
    console: Console,
) -> int:
    """Stream the test shards whose predictions are missing; how many images went through the backbone."""
    missing = []
    for work in works:
        files = {
            predictions_file(work, chosen[work.task.name], shard): shard for shard in work.shards("test")
        }
        absent, _ = run.reconcile(f"{work.folder('predictions')}/kind=frozen", files)
        missing += [files[name] for name in absent]
    if not missing:
        console.print(f"{'evaluate':<9} nothing to do: all predictions are there")
        return 0
    arguments = {"run": run, "chosen": chosen, "config": config}
    return process_shards("evaluate", missing, works, run, Predictor, arguments, config, cluster, console)


class Predictor:
    """Step of the evaluation: a shard's test images to the predictions of all heads; state of an actor."""

    def __init__(self, run: RunDirectory, chosen: dict[str, list[Hyperparameters]], config: Config) -> None:
        self.run, self.chosen = run, chosen
        sizes = sorted({settings.target_size for points in chosen.values() for settings in points})
        self.features = FeatureReader(config, sizes)
        self.task = ""
        self.heads: list[Head] = []

    def __call__(self, work: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray) -> None:
        """Write the shard's predictions: index, label and one int32 column per method and seed."""
        self._take_heads_of(work)
        parts = [self._predict(taps) for taps in self.features.read(images)]
        predictions = np.concatenate([np.empty((0, len(self.heads)), np.int32), *parts])
        columns = {"index": pa.array(index, pa.int32()), "label": pa.array(work.labels["test"][index])}
        for number, head in enumerate(self.heads):
            columns[prediction_column(head.settings.method, head.seed)] = pa.array(predictions[:, number])
        name = predictions_file(work, self.chosen[shard.task], shard)
        self.run.write_table(name, pa.table(columns), compression="zstd")

    def _take_heads_of(self, work: TaskData) -> None:
        if self.task != work.task.name:
            names = _all_heads(work, self.chosen[work.task.name])
            self.heads = [load_head(self.run.read(name))[0] for name in names]
            self.bank = HeadBank(self.heads, self.features.device)
            self.task = work.task.name

    def _predict(self, taps: dict[int, list[torch.Tensor]]) -> np.ndarray:
        """Predicted classes of one batch, int32 [b, n_heads]."""
        return self.bank.predict({size: torch.cat(taps[size], 1) for size in self.bank.target_sizes})


def prediction_column(method: str, seed: int) -> str:
    """The column of predictions of one head."""
    return f"{method}_seed{seed}"


def write_results(work: TaskData, chosen: list[Hyperparameters], run: RunDirectory) -> None:
    """Result rows and kept features per tap of one task from its predictions and heads."""
    heads = _all_heads(work, chosen)
    results = work.file("results", "frozen", "results.parquet", heads, selected_file(work))
    kept = work.file("kept", "frozen", "kept.parquet", heads)
    missing = [name for name in (results, kept) if run.reconcile(name.rpartition("/")[0], [name])[0]]
    if not missing:
        return
    loaded = [load_head(run.read(name)) for name in heads]
    if kept in missing:
        run.write_frame(kept, pd.concat([_kept(work, head) for head, _ in loaded], ignore_index=True))
    if results in missing:
        predictions = run.read_frame(predictions_file(work, chosen, shard) for shard in work.shards("test"))
        validation = run.read_frame([selected_file(work)]).set_index("method")["validation_accuracy"]
        described = read_manifest(work, run)
        rows = [_result(work, head, stated, predictions, validation, described) for head, stated in loaded]
        run.write_frame(results, pd.DataFrame(rows))


def _result(
    work: TaskData,
    head: Head,
    provenance: dict[str, str],
    predictions: pd.DataFrame,
    validation: pd.Series,
    described: dict[str, Any],
) -> dict[str, Any]:
    settings, config = head.settings, work.config
    predicted = predictions[prediction_column(settings.method, head.seed)].to_numpy()
    n_correct, n_test = correct(predictions["label"].to_numpy(), predicted), len(predicted)
    n_train = len(work.labels["train"])
    size = HeadSize(head.layout.n_features, len(head.kept), work.n_classes)
    cost = BackboneCost(**described["cost"])
    counts = {"n_images": n_train, "batch_size": config.batch_size}
    return {
        "backbone": backbone_folder(config),
        "task": work.task.name,
        "group": work.task.group,
        "method": settings.method,
        "seed": head.seed,
        "test_accuracy": n_correct / n_test,
        "n_test": n_test,
        "n_correct": n_correct,
        "n_train": n_train,
        "n_classes": work.n_classes,
        "n_features": head.layout.n_features,
        "n_kept": len(head.kept),
        "target_size": settings.target_size,
        "learning_rate": settings.learning_rate,
        "steps": settings.steps,
        "coefficient": settings.coefficient,
        "keep_fraction": settings.keep_fraction,
        "validation_accuracy": float(validation[settings.method]),
        "train_seconds": float(provenance["train_seconds"]),
        "peak_memory_bytes": int(provenance["peak_memory_bytes"]),
        "modelled_flops": training_flops(settings.method, cost, size, settings.steps, **counts),
        "modelled_storage_bytes": storage_bytes(settings.method, cost, size),
        "image_source": config.task_images(work.task.name).format,
        "preprocessing": f"{config.backbone.resize}, {config.backbone.normalization}",
        "fold_scheme": config.cross_validation.scheme,
        "weights": described["backbone"]["loaded"],
        "status": "done",
        "fingerprint": work.fingerprint,
    }


def _kept(work: TaskData, head: Head) -> pd.DataFrame:
    counts = np.bincount(head.layout.tap_of(head.kept), minlength=len(head.layout.taps))
    return pd.DataFrame(
        {
            "backbone": backbone_folder(work.config),
            "task": work.task.name,
            "method": head.settings.method,
            "seed": head.seed,
            "tap": list(head.layout.taps),
            "tap_index": range(len(head.layout.taps)),
            "n_features": list(head.layout.widths),
            "n_kept": counts,
        }
    )
