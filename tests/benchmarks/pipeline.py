"""Extraction through Ray Data against a plain loop: same model, images and threads, in one run.

    python -m tests.benchmarks.pipeline [--tasks mnist dsprites_loc] [--actors 2]

The plain loop reads, decodes, runs the backbone, pools and writes the same files in one process with as many
threads as Ray has actors. Ray's rate is given twice: with the start of its actors, and from the first shard
that each actor has finished to the last (what a long run sees).
"""

import argparse
import tempfile
import time
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from h2t.images.preprocessing import prepare
from pipelines.cli import shipped_recipes
from pipelines.extract import FeatureWriter, feature_products
from pipelines.products import Shard
from pipelines.recipe import load_config
from pipelines.run_directory import RunDirectory
from pipelines.session import Session
from pipelines.shard_stream import shards_for, stream_shards


def plain_loop(session: Session, threads: int) -> float:
    """Images per second of one process that does everything itself; the model is loaded beforehand."""
    write = FeatureWriter(session.run, session.config)
    torch.set_num_threads(threads)
    started, count = time.perf_counter(), 0
    for shard in missing_shards(session):
        task = session.tasks[shard.task]
        read = task.read(shard.split, shard.indices)
        images = [prepare(image, write.reader.preprocessing) for image in read]
        write(task, shard, images, np.array(shard.indices))
        count += len(images)
    return count / (time.perf_counter() - started)


def missing_shards(session: Session) -> list[Shard]:
    """All shards of training images: nothing is there yet."""
    gaps = [gap for product in feature_products(session) for gap in product.missing(session.run, [])]
    return shards_for(session, gaps)


def through_ray(session: Session, actors: int) -> tuple[float, float]:
    """Images per second through Ray Data: with and without the start of the actors."""
    _ = session.cluster
    started, finished, counts = time.perf_counter(), [], []
    make_step = partial(FeatureWriter, session.run, session.config)
    for row in stream_shards(session, missing_shards(session), make_step):
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
    config = load_config(shipped_recipes()["demo"], overrides)
    with tempfile.TemporaryDirectory() as scratch:
        sessions = [
            Session(config, RunDirectory(f"{scratch}/{name}"), Console(quiet=True))
            for name in ("plain", "ray", "plain-again")
        ]
        before = plain_loop(sessions[0], options.actors)
        with_start, steady = through_ray(sessions[1], options.actors)
        after = plain_loop(sessions[2], options.actors)
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
