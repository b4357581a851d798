"""A run on a cluster that a node joins when some of the work is done: which node did what.

    python -m tests.pipelines.joining FOLDER

``FOLDER`` has a recipe; ``FOLDER/extract`` and ``FOLDER/sweep`` get a file for each unit of work, whose
content is the node, and ``FOLDER/STAGE-joined`` names the one that joined.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster as RayCluster
from rich.console import Console

from pipelines import cross_validation, extract
from pipelines.config import Config
from pipelines.products import Gap, Shard, shards
from pipelines.recipe import load_config
from pipelines.run import STAGES, run_stages
from pipelines.run_directory import RunDirectory
from pipelines.session import Advance, Session
from pipelines.shard_stream import Seen, process_shards
from pipelines.task_data import TaskData

# That a unit takes at least, so that a node can join and start its workers meanwhile.
SECONDS = {"extract": 4.0, "sweep": 8.0}


def record(folder: Path, name: str) -> None:
    time.sleep(SECONDS[folder.name])
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(ray.get_runtime_context().get_node_id())


class RecordedWriter(extract.FeatureWriter):
    """The extraction, which says where it was done."""

    def __init__(self, folder: Path, run: RunDirectory, config: Config) -> None:
        super().__init__(run, config)
        self.folder = folder

    def __call__(
        self, task: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray, seen: Seen
    ) -> None:
        super().__call__(task, shard, images, index, seen)
        record(self.folder, f"{task.name}-{shard.start}")


def recorded_features(folder: Path, session: Session, gaps: Sequence[Gap], advance: Advance) -> None:
    missing = shards(gaps, session.config.resources.shard_size)
    process_shards(session, missing, partial(RecordedWriter, folder, session.run, session.config), advance)


def recorded_packs(folder: Path, packs: Any, shared: Any) -> Iterator[dict[str, Any]]:
    yield from _RUN_PACKS(packs, shared)
    record(folder, str(time.time_ns()))


_RUN_PACKS = cross_validation.run_packs


def run_while_a_node_joins(
    config: Config, uri: str, stage: str, cluster: RayCluster, folder: Path, n_before: int
) -> None:
    """Run a stage; a node joins when so many units are done. Ray wants to add it in the main thread."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            run_stages(config, uri, [stage], Console(quiet=True), cluster.address)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while len(list(folder.glob("*"))) < n_before and thread.is_alive():
        time.sleep(0.05)
    joined = cluster.add_node(num_cpus=3, object_store_memory=200 << 20)
    folder.with_name(f"{stage}-joined").write_text(joined.node_id)
    thread.join()
    if failed:
        raise failed[0]


def main(folder: Path) -> None:
    config = load_config(str(folder / "recipe.yaml"), ())
    step, *others = STAGES["extract"]
    STAGES["extract"] = [replace(step, make=partial(recorded_features, folder / "extract")), *others]
    cross_validation.run_packs = partial(recorded_packs, folder / "sweep")
    cross_validation.LEAST_FLOPS = 0  # as if these units took long by themselves
    cluster = RayCluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "object_store_memory": 200 << 20, "include_dashboard": False},
    )
    run = RunDirectory(str(folder / "run"))
    for stage in ("extract", "sweep"):
        run_while_a_node_joins(config, run.uri, stage, cluster, folder / stage, 2)
    run_stages(config, run.uri, ["evaluate"], Console(quiet=True), cluster.address)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
