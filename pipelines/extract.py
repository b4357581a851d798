"""Stage 1, Ray Data: training images to the pooled features of every tap, one Parquet file per shard."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from typing import Any

import numpy as np
from rich.console import Console

from h2t.backbones.tap_reader import feature_layout
from h2t.costs import BackboneCost, measure_backbone
from h2t.features import FeatureLayout
from pipelines.backbone_actor import FeatureReader, load
from pipelines.cluster import Cluster
from pipelines.config import Config
from pipelines.feature_files import write_features
from pipelines.run_directory import RunDirectory
from pipelines.shard_stream import process_shards
from pipelines.task_data import Shard, Split, TaskData

PACKAGES = ("head2toe-ray", "numpy", "pillow", "pyarrow", "ray", "timm", "torch")


def extract(
    config: Config, works: Sequence[TaskData], run: RunDirectory, cluster: Cluster, console: Console
) -> int:
    """Write the feature files that are missing; how many images went through the backbone.

    One forward pass serves all target sizes. Raises UserError that lists the images that can't be read.
    """
    missing = missing_shards(config, works, run, console)
    if missing:
        n_images = process_shards(
            "extract",
            missing,
            works,
            run,
            FeatureWriter,
            {"run": run, "config": config},
            config,
            cluster,
            console,
        )
    else:
        console.print(f"{'extract':<9} nothing to do: the features of {len(works)} tasks are there")
        n_images = 0
    write_manifests(config, works, run)
    return n_images


def write_manifests(config: Config, works: Sequence[TaskData], run: RunDirectory) -> None:
    """Say of every folder of features what it holds, where that is not said yet."""
    folders = [
        (work, split, size)
        for work in works
        for split, size in product(work.stored_splits, config.grid.target_size)
        if not _is_described(run, work, split, size)
    ]
    if not folders:
        return
    backbone = load(config.backbone)
    cost = measure_backbone(backbone)
    layouts = {
        size: feature_layout(backbone, size, config.backbone.cls_token) for size in config.grid.target_size
    }
    for work, split, size in folders:
        manifest = feature_manifest(work, split, size, layouts[size], backbone.weights, cost)
        run.write_json(manifest_file(work, split, size), manifest)


def manifest_file(work: TaskData, split: Split, target_size: int) -> str:
    """The file that says what a folder of features holds; readers of Parquet skip its name."""
    return f"{work.feature_folder(split, target_size)}/_manifest.json"


def read_manifest(work: TaskData, run: RunDirectory) -> dict[str, Any]:
    """What is said of the features of a task's training images; the backbone and its cost among it."""
    name = manifest_file(work, "train", work.config.grid.target_size[0])
    run.require([name], "extract")
    manifest: dict[str, Any] = run.read_json(name)
    return manifest


def _is_described(run: RunDirectory, work: TaskData, split: Split, target_size: int) -> bool:
    name = manifest_file(work, split, target_size)
    return run.exists(name) and run.read_json(name)["fingerprint"] == work.fingerprint


def feature_manifest(
    work: TaskData, split: Split, target_size: int, layout: FeatureLayout, weights: str, cost: BackboneCost
) -> dict[str, Any]:
    """What the features of a split are: files, taps, and everything that they come from."""
    return {
        "fingerprint": work.fingerprint,
        "files": [name.rpartition("/")[2] for name in work.feature_files(split, target_size)],
        "taps": dict(zip(layout.taps, layout.widths, strict=True)),
        "n_features": layout.n_features,
        "n_images": len(work.labels[split]),
        "backbone": work.config.backbone.model_dump() | {"loaded": weights},
        "cost": asdict(cost),
        "images": work.source_of(split)[0].provenance(),
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    return {name: version(name) for name in PACKAGES}


def missing_shards(
    config: Config, works: Sequence[TaskData], run: RunDirectory, console: Console | None = None
) -> list[Shard]:
    """Shards of training images of which a feature file is missing, whole tasks in order."""
    missing, stale = [], 0
    for work, split in [(each, split) for each in works for split in each.stored_splits]:
        absent: set[str] = set()
        for size in config.grid.target_size:
            names, moved = run.reconcile(work.feature_folder(split, size), work.feature_files(split, size))
            absent.update(names)
            stale += moved
        files = {
            shard: {work.feature_file(shard, size) for size in config.grid.target_size}
            for shard in work.shards(split)
        }
        missing += [shard for shard, names in files.items() if names & absent]
    if stale and console:
        console.print(f"{'extract':<9} {stale} files of another configuration moved to superseded/")
    return missing


class FeatureWriter:
    """Step of the extraction: a shard's images to its feature files; state of an actor."""

    def __init__(self, run: RunDirectory, config: Config) -> None:
        self.run = run
        self.features = FeatureReader(config, config.grid.target_size)
        self.layouts = {
            size: feature_layout(self.features.backbone, size, config.backbone.cls_token)
            for size in config.grid.target_size
        }

    def __call__(self, work: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray) -> None:
        """Write the shard's file of every target size."""
        write_features(
            self.run,
            {size: work.feature_file(shard, size) for size in self.layouts},
            self.layouts,
            index,
            work.labels[shard.split][index],
            self.features.read(images),
            work.config.resources.feature_compression,
        )
