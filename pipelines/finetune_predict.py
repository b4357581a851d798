"""Predictions of adapted models for the test images: one Ray Data pipeline, as for the frozen heads."""

from collections.abc import Sequence

import numpy as np

from h2t.device import default_device, use_threads
from h2t.finetuning import OutOfMemory, TrainableModel, predict_logits
from pipelines.artifacts import Finetuning
from pipelines.backbone import preprocessing_of
from pipelines.finetune_trial import backbone_to_train, with_advice
from pipelines.model_files import read_model
from pipelines.products import Shard
from pipelines.results import prediction_table
from pipelines.run_directory import RunDirectory
from pipelines.shard_stream import Seen
from pipelines.task_data import TaskData


class FinetunedPredictor:
    """A shard's test images to the predictions of all adapted models of its task; state of an actor."""

    def __init__(self, run: RunDirectory, models: dict[str, list[Finetuning]]) -> None:
        self.run, self.members = run, models
        self.task = ""
        self.models: list[TrainableModel | None] = []

    def __call__(
        self, task: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray, seen: Seen
    ) -> None:
        """Write the shard's predictions."""
        if self.task != task.name:
            self._load_models(task)
        members = self.members[task.name]
        logits = [self._logits(model, images, task) for model in self.models]
        columns = [(member.point.method, member.seed) for member in members]
        ((_, name),) = shard.files
        self.run.write_table(name, prediction_table(task, columns, index, logits), compression="zstd")

    def _load_models(self, task: TaskData) -> None:
        config = task.config
        use_threads(config.resources.cpus_per_actor)
        self.preprocessing = preprocessing_of(config.backbone)
        self.models = []
        for member in self.members[task.name]:
            # The architecture alone: the weights are in the file.
            backbone = backbone_to_train(config, pretrained=False, seed=0, device=default_device())
            options = config.finetune.options()
            model, content = read_model(self.run, member.file, backbone, options, config.backbone.aggregation)
            self.models.append(model if content["status"] == "done" else None)
        self.task = task.name

    def _logits(
        self, model: TrainableModel | None, images: Sequence[np.ndarray], task: TaskData
    ) -> np.ndarray | None:
        if model is None:
            return None
        size = task.config.resources.images_per_forward
        with with_advice(OutOfMemory, "lower resources.images_per_forward"):
            return predict_logits(model, images, self.preprocessing, size)
