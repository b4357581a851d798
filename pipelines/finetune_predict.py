"""Predictions of adapted models for the test images: one Ray Data pipeline, as for the frozen heads."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console

from h2t.finetuning import TrainableModel, load_model, predict_logits
from pipelines.backbone_actor import preprocessing_of
from pipelines.cluster import Cluster
from pipelines.config import Config
from pipelines.evaluate import prediction_column
from pipelines.finetune_trial import TrainedTrial, backbone_to_train
from pipelines.run_directory import RunDirectory
from pipelines.shard_stream import process_shards
from pipelines.task_data import Shard, TaskData


def prediction_files(work: TaskData, final: dict[str, list[TrainedTrial]]) -> dict[str, Shard]:
    """Where the predictions of the adapted models of a task lie, one file per shard of test images."""
    models = [trial.file for trial in final[work.task.name]]
    if not models:
        return {}
    return {
        work.file("predictions", "trained", f"part-{shard.number:05d}.parquet", models): shard
        for shard in work.shards("test")
    }


def predict_with_trained(
    config: Config,
    works: Sequence[TaskData],
    final: dict[str, list[TrainedTrial]],
    run: RunDirectory,
    cluster: Cluster,
    console: Console,
) -> None:
    """Stream the test shards whose predictions are missing through all adapted models of their task."""
    missing: list[Shard] = []
    names: dict[Shard, str] = {}
    for work in works:
        files = prediction_files(work, final)
        absent, _ = run.reconcile(f"{work.folder('predictions')}/kind=trained", files)
        missing += [files[name] for name in absent]
        names |= {files[name]: name for name in absent}
    if missing:
        arguments = {"run": run, "final": final, "names": names}
        process_shards("finetune", missing, works, run, TrainedPredictor, arguments, config, cluster, console)


class TrainedPredictor:
    """A shard's test images to the predictions of all adapted models of its task; state of an actor."""

    def __init__(
        self, run: RunDirectory, final: dict[str, list[TrainedTrial]], names: dict[Shard, str]
    ) -> None:
        self.run, self.final, self.names = run, final, names
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.task = ""
        self.models: dict[str, TrainableModel | None] = {}

    def __call__(self, work: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray) -> None:
        """Write index, label and one int32 column per method and seed; -1 where its training diverged."""
        self._take_models_of(work)
        columns = {"index": pa.array(index, pa.int32()), "label": pa.array(work.labels["test"][index])}
        for column, model in self.models.items():
            columns[column] = pa.array(self._predict(model, images, work), pa.int32())
        self.run.write_table(self.names[shard], pa.table(columns), compression="zstd")

    def _predict(self, model: TrainableModel | None, images: list[np.ndarray], work: TaskData) -> np.ndarray:
        if model is None:
            return np.full(len(images), -1)
        logits = predict_logits(model, images, self.preprocessing, work.config.resources.batch_size)
        return logits.argmax(1)

    def _take_models_of(self, work: TaskData) -> None:
        if self.task == work.task.name:
            return
        config = work.config
        torch.set_num_threads(config.resources.cpus_per_actor)
        self.models = {}
        for trial in self.final[work.task.name]:
            backbone = backbone_to_train(config, "scratch", 0, self.device)
            self.preprocessing = preprocessing_of(config.backbone, backbone)
            data = self.run.read(trial.file)
            model, content = load_model(data, backbone, config.finetune, config.backbone.cls_token)
            column = prediction_column(trial.settings.method, trial.seed)
            self.models[column] = model if content["status"] == "done" else None
        self.task = work.task.name
