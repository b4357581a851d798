"""Stage 1, Ray Data: training images to the pooled features of every tap, cut by rows into Parquet files."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import numpy as np

from h2t.backbones.pretrained import find_weights, name_in_timm, weights_identity
from h2t.costs import measure_backbone
from pipelines.artifacts import backbone_folder, bad_rows, features, features_key, manifest, write_rows
from pipelines.backbone import layouts, load_whole
from pipelines.config import Config
from pipelines.feature_files import FeatureTable, write_features
from pipelines.products import Gap, RowFiles, Shard, count_rows
from pipelines.run_directory import RunDirectory
from pipelines.run_record import package_versions
from pipelines.schemas import BAD_ROWS
from pipelines.session import Advance, Session, Step
from pipelines.shard_stream import FeatureReader, Seen, process_shards, shards_for
from pipelines.task_data import TaskData


def feature_products(session: Session) -> list[RowFiles]:
    """Features of the stored splits of every task, at every target size."""
    return [
        features(task, split, size)
        for task in session.tasks.values()
        for split in task.stored_splits
        for size in session.config.grid.target_size
        if session.config.features.store == "features"
    ]


def make_features(session: Session, gaps: Sequence[Gap], advance: Advance) -> None:
    """Write the rows that are missing; one forward pass serves all target sizes."""
    process_shards(
        session,
        shards_for(session, gaps),
        partial(FeatureWriter, session.run, session.config),
        advance,
    )


class FeatureWriter:
    """Step of the extraction: a shard's images to its feature files; state of an actor."""

    def __init__(self, run: RunDirectory, config: Config) -> None:
        self.run = run
        self.reader = FeatureReader(config, config.grid.target_size)
        backbone = self.reader.backbone
        self.layouts = layouts(config, backbone)

    def __call__(
        self, task: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray, seen: Seen
    ) -> None:
        """Write the shard's file of every target size that lacks its rows."""
        keys = (backbone_folder(task.config), task.name, shard.split)
        embedding = self.reader.backbone.embedding
        tables = {
            name: FeatureTable(*keys, size, self.layouts[size], embedding, task.config.features.precision)
            for size, name in shard.files
        }
        write_features(
            self.run,
            tables,
            index,
            task.labels[shard.split][index],
            self.reader.read_all(images, seen),
            task.config.resources.feature_compression,
        )


def make_manifests(session: Session, tasks: Sequence[str], advance: Advance) -> None:
    """Describe the features of every task: taps, backbone, its costs, images, packages."""
    if not tasks:
        return
    config = session.config
    cost = measure_backbone(load_whole(config.backbone))
    section = config.backbone
    weights = weights_identity(section.name, section.weights, section.sha256)
    if section.weights != "random":
        weights = f"{find_weights(name_in_timm(section.name), section.weights).name}, {weights}"
    for task in map(session.tasks.__getitem__, tasks):
        (name,) = manifest(task).units
        content = {
            "task": task.name,
            "backbone": section.model_dump() | {"loaded": weights, "embedding": session.backbone.embedding},
            "cost": asdict(cost),
            "taps": {
                str(size): dict(zip(layout.taps, layout.widths, strict=True))
                for size, layout in session.layouts.items()
            },
            "images": task.sources["train"][0].provenance(),
            "n_images": {split: len(labels) for split, labels in task.labels.items()},
            "keys": {split: features_key(task, split) for split in task.stored_splits},
            "packages": package_versions(),
        }
        session.run.write_json(name, content)


def list_files_left_out(session: Session, tasks: Sequence[str], advance: Advance) -> None:
    """Write which files lie among a task's images and are no rows."""
    for task in map(session.tasks.__getitem__, tasks):
        (name,) = bad_rows(task).units
        rows = [asdict(row) | {"backbone": backbone_folder(session.config)} for row in task.left_out]
        write_rows(session.run, name, BAD_ROWS, rows)


STEPS = (
    Step("extract", "images", feature_products, make_features, count_rows),
    Step("bad rows", "lists", lambda session: [bad_rows(task) for task in session.tasks.values()],
         list_files_left_out, brief=True),
    Step("manifests", "manifests", lambda session: [manifest(task) for task in session.tasks.values()],
         make_manifests, brief=True),
)  # fmt: skip
