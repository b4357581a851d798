"""Extraction through Ray Data against a plain loop: same model, images and threads, in one run.

    python -m tests.benchmarks.pipeline [--images 2000]

The plain loop reads, decodes, runs the backbone, pools and writes the same files in one process with as many
threads as Ray has actors. Ray's rate is given twice: with the start of its actors, and from the first shard
that each actor has finished to the last (what a long run sees).
"""

import argparse
import tempfile
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from h2t.backbones.tap_reader import feature_layout
from h2t.images.preprocessing import prepare
from pipelines.backbone_actor import FeatureReader, load, preprocessing_of
from pipelines.cli import shipped_recipes
from pipelines.cluster import connect
from pipelines.extract import FeatureWriter, missing_shards
from pipelines.feature_files import write_features
from pipelines.recipe import load_config
from pipelines.run_directory import RunDirectory
from pipelines.shard_stream import ShardActor, stream_shards
from pipelines.task_data import TaskData, open_tasks


def plain_loop(works: list[TaskData], run: RunDirectory, threads: int) -> float:
    """Images per second of one process that does everything itself; the model is loaded beforehand."""
    config = works[0].config
    reader = FeatureReader(config, config.grid.target_size)
    torch.set_num_threads(threads)
    layouts = {size: feature_layout(reader.backbone, size) for size in config.grid.target_size}
    started, count = time.perf_counter(), 0
    for work in works:
        for shard in work.shards("train"):
            images = [prepare(image, reader.preprocessing) for image in work.read("train", shard.indices)]
            names = {size: work.feature_file(shard, size) for size in layouts}
            labels = work.labels["train"][list(shard.indices)]
            write_features(run, names, layouts, np.array(shard.indices), labels, reader.read(images))
            count += len(images)
    return count / (time.perf_counter() - started)


def through_ray(works: list[TaskData], run: RunDirectory, actors: int) -> tuple[float, float]:
    """Images per second through Ray Data: with and without the start of the actors."""
    config = works[0].config
    cluster = connect()
    preprocessing = preprocessing_of(config.backbone, load(config.backbone))
    arguments = {
        "run": run,
        "step": FeatureWriter,
        "arguments": {"run": run, "config": config},
    }
    started, finished, counts = time.perf_counter(), [], []
    shards = missing_shards(config, works, run)
    for row in stream_shards(shards, works, preprocessing, ShardActor, arguments, config, cluster):
        finished.append(time.perf_counter())
        counts.append(row["n_images"])
    steady = sum(counts[actors:]) / (finished[-1] - finished[actors - 1])
    return sum(counts) / (finished[-1] - started), steady


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="+", default=["mnist", "solar_cells", "dsprites_loc", "dsprites_ori"]
    )
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    overrides = [f"tasks={options.tasks}", f"resources.actors={options.actors}", "resources.shard_size=125"]
    works = open_tasks(load_config(shipped_recipes()["demo"], overrides))
    with tempfile.TemporaryDirectory() as scratch:
        before = plain_loop(works, RunDirectory(f"{scratch}/plain"), options.actors)
        with_start, steady = through_ray(works, RunDirectory(f"{scratch}/ray"), options.actors)
        after = plain_loop(works, RunDirectory(f"{scratch}/plain-again"), options.actors)
    plain = (before + after) / 2
    table = Table("extraction", "images/s", "of the plain loop")
    table.add_row(
        f"plain loop, {options.actors} threads, before and after", f"{before:.0f}, {after:.0f}", "1"
    )
    table.add_row("Ray Data, start of the actors included", f"{with_start:.0f}", f"{with_start / plain:.2f}")
    table.add_row("Ray Data, after the first shards", f"{steady:.0f}", f"{steady / plain:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
