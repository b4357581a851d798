"""Stage 1, Ray Data: training images to the pooled features of every tap, one Parquet file per shard."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console

from h2t.config import Config
from h2t.costs import BackboneCost, measure_backbone
from h2t.feature_files import feature_table, parquet_options
from h2t.features import FeatureLayout
from h2t.images import BadRow
from h2t.store import RunDirectory
from h2t.taps import feature_layout
from h2t.work import Shard, Split, TaskWork, refuse_bad_rows
from pipelines.backbone_actor import FeatureReader, load, manifest_row, preprocessing_of, write_bad_rows
from pipelines.cluster import Cluster
from pipelines.progress import StageProgress
from pipelines.stream import decoded_images, stream_shards

PACKAGES = ("head2toe-ray", "numpy", "pillow", "pyarrow", "ray", "timm", "torch")


def extract(
    config: Config, works: Sequence[TaskWork], run: RunDirectory, cluster: Cluster, console: Console
) -> int:
    """Write the feature files that are missing; how many images went through the backbone.

    One forward pass serves all target sizes. Raises UserError that lists the images that can't be read.
    """
    missing = missing_shards(config, works, run, console)
    if missing:
        n_images = _extract_shards(config, works, missing, run, cluster, console)
    else:
        console.print(f"{'extract':<9} nothing to do: the features of {len(works)} tasks are there")
        n_images = 0
    write_manifests(config, works, run)
    return n_images


def _extract_shards(
    config: Config,
    works: Sequence[TaskWork],
    shards: list[Shard],
    run: RunDirectory,
    cluster: Cluster,
    console: Console,
) -> int:
    preprocessing = preprocessing_of(config.backbone, load(config.backbone))
    arguments = {"run": run, "works": {work.task.name: work for work in works}, "config": config}
    n_images, bad = 0, []
    total = sum(len(shard.indices) for shard in shards)
    with StageProgress(console, "extract", total, "images") as progress:
        rows = stream_shards(shards, works, preprocessing, FeatureWriter, arguments, config, cluster)
        for row in rows:
            n_images += row["n_images"]
            bad += row["bad"]
            progress.advance(row["n_images"] + len(row["bad"]), f"{row['task']}/{row['split']}")
    if config.on_bad_image == "refuse":
        refuse_bad_rows(BadRow(**row) for row in bad)
    return n_images


def write_manifests(config: Config, works: Sequence[TaskWork], run: RunDirectory) -> None:
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


def manifest_file(work: TaskWork, split: Split, target_size: int) -> str:
    """The file that says what a folder of features holds; readers of Parquet skip its name."""
    return f"{work.feature_folder(split, target_size)}/_manifest.json"


def read_manifest(work: TaskWork, run: RunDirectory) -> dict[str, Any]:
    """What is said of the features of a task's training images; the backbone and its cost among it."""
    name = manifest_file(work, "train", work.config.grid.target_size[0])
    run.require([name], "extract")
    manifest: dict[str, Any] = run.read_json(name)
    return manifest


def _is_described(run: RunDirectory, work: TaskWork, split: Split, target_size: int) -> bool:
    name = manifest_file(work, split, target_size)
    return run.exists(name) and run.read_json(name)["fingerprint"] == work.fingerprint


def feature_manifest(
    work: TaskWork, split: Split, target_size: int, layout: FeatureLayout, weights: str, cost: BackboneCost
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
    config: Config, works: Sequence[TaskWork], run: RunDirectory, console: Console | None = None
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
    """Actor: a decoded shard in, its feature files written, one manifest row out."""

    def __init__(
        self, shards: list[Shard], run: RunDirectory, works: dict[str, TaskWork], config: Config
    ) -> None:
        self.shards, self.run, self.works = shards, run, works
        self.features = FeatureReader(config, config.grid.target_size)
        self.layouts = {
            size: feature_layout(self.features.backbone, size, config.backbone.cls_token)
            for size in config.grid.target_size
        }

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the shard's file of every target size that is missing."""
        shard = self.shards[batch["shard"][0].as_py()]
        work = self.works[shard.task]
        images, index = decoded_images(batch)
        bad = write_bad_rows(self.run, work, shard, batch)
        if bad and work.config.on_bad_image == "refuse":
            return manifest_row(shard, 0, bad)
        batches = list(self.features.read(images))
        for size, layout in self.layouts.items():
            taps = [torch.cat([part[size][tap].cpu() for part in batches]) for tap in range(len(layout.taps))]
            table = feature_table(index, work.labels[shard.split][index], taps, layout)
            self._write(work.feature_file(shard, size), table)
        return manifest_row(shard, len(images), bad)

    def _write(self, name: str, table: pa.Table) -> None:
        options: dict[str, Any] = parquet_options(table)
        self.run.write_table(name, table, row_group_size=len(table) or 1, **options)
