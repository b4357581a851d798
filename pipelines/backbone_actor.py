"""What the actors that run a frozen backbone share: loading it, and features of a decoded shard."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.tap_reader import TapReader
from h2t.extraction import preprocessing_for
from h2t.images.preprocessing import Preprocessing, to_batch
from pipelines.config import BackboneConfig, Config
from pipelines.run_directory import RunDirectory
from pipelines.task_data import Shard, TaskData


def load(config: BackboneConfig, device: str = "cpu") -> Backbone:
    """The backbone of a recipe."""
    return load_backbone(
        config.name,
        weights=config.weights,
        image_size=config.image_size,
        taps=config.taps,
        device=device,
        dtype=config.dtype,
        sha256=config.sha256,
    )


def preprocessing_of(config: BackboneConfig, backbone: Backbone) -> Preprocessing:
    """How images reach the backbone of a recipe."""
    return preprocessing_for(backbone, config.resize, config.normalization)


class FeatureReader:
    """A backbone with its hooks on one device; state of an actor."""

    def __init__(self, config: Config, target_sizes: list[int]) -> None:
        torch.set_num_threads(config.resources.cpus_per_actor)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.backbone = load(config.backbone, self.device)
        self.preprocessing = preprocessing_of(config.backbone, self.backbone)
        self.reader = TapReader(self.backbone, target_sizes, config.backbone.cls_token)
        self.batch_size = config.resources.batch_size

    def read(self, images: list[np.ndarray]) -> Iterator[dict[int, list[torch.Tensor]]]:
        """Features of each batch of images: per target size, one float32 [b, width] per tap."""
        for start in range(0, len(images), self.batch_size):
            chunk = images[start : start + self.batch_size]
            batch = to_batch(chunk, self.preprocessing, self.device)
            yield self.reader(batch)


def write_bad_rows(run: RunDirectory, work: TaskData, shard: Shard, batch: pa.Table) -> list[dict[str, Any]]:
    """The bad rows of a decoded shard; where the recipe skips them they are written as a table as well."""
    bad = batch["bad"][0].as_py()
    if bad and work.config.on_bad_image == "skip":
        run.write_table(bad_rows_file(work, shard), pa.Table.from_pylist(bad))
    return bad


def bad_rows_file(work: TaskData, shard: Shard) -> str:
    """Where the bad rows of a shard are listed, when there are any."""
    return f"{work.folder('bad_rows')}/{shard.split}-{shard.number:05d}-{work.fingerprint}.parquet"


def manifest_row(shard: Shard, n_images: int, bad: list[dict[str, Any]], mistake: str = "") -> pa.Table:
    """The one small row that an actor returns for a shard; ``mistake``: the user's, which ends the run."""
    row = {"task": shard.task, "split": shard.split, "number": shard.number, "n_images": n_images, "bad": bad}
    return pa.Table.from_pylist([{**row, "mistake": mistake}])
