"""How busy devices are in a run: one stage after the other, or the sweep beside the extraction.

    python -m tests.benchmarks.devices [--devices 4] [--image-seconds 0.6] [--runs 1 2]

Logical GPUs on this machine, and a backbone and trials of stated cost: each does its real work on tiny
features and then sleeps for the rest of its time, so that Ray, Tune and the files are those of a run. A
device is busy from the moment that it has a shard or a pack until that is done. With two runs at once the
second one's actors follow those of the first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.table import Table

from pipelines import cross_validation, extract, run
from pipelines.config import Config
from pipelines.products import Gap, Shard
from pipelines.recipe import parse_config
from pipelines.run_directory import RunDirectory
from pipelines.session import Advance, Session
from pipelines.shard_stream import Seen, process_shards, shards_for
from pipelines.task_data import TaskData
from tests.pipelines.conftest import write_task

TASKS, N_IMAGES, N_FOLDS = 6, 300, 5


@contextmanager
def busy(log: Path, seconds: float) -> Iterator[None]:
    """A device that is busy for so long at least; says from when to when."""
    started = time.time()
    yield
    time.sleep(max(0.0, started + seconds - time.time()))
    (log / f"{uuid.uuid4()}.json").write_text(json.dumps([started, time.time()]))


class SlowWriter(extract.FeatureWriter):
    """The step of the extraction on a device of a stated speed."""

    def __init__(self, directory: RunDirectory, config: Config, log: Path, image_seconds: float) -> None:
        super().__init__(directory, config)
        self.log, self.image_seconds = log, image_seconds

    def __call__(
        self, task: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray, seen: Seen
    ) -> None:
        """Write the shard's files, in as long as its images take."""
        with busy(self.log, self.image_seconds * len(images)):
            super().__call__(task, shard, images, index, seen)


def slow_features(
    log: Path, image_seconds: float, session: Session, gaps: Sequence[Gap], advance: Advance
) -> None:
    """The extraction with such writers."""
    step = partial(SlowWriter, session.run, session.config, log, image_seconds)
    process_shards(session, shards_for(session, gaps), step, advance)


def slow_packs(
    log: Path, pack_seconds: float, packs: Sequence[cross_validation.Pack], shared: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Packs of trials on a device of a stated speed."""
    for pack in packs:
        with busy(log, pack_seconds):
            yield from _run_packs([pack], shared)


_run_packs = cross_validation.run_packs


def recipe(root: Path, devices: int) -> Config:
    """Tasks of equal size on a tiny backbone."""
    tasks = [
        {"name": f"task{number}", "n_classes": 2, "group": "natural",
         "images": {"format": "parquet", "root": str(root / f"task{number}")}}
        for number in range(TASKS)
    ]  # fmt: skip
    return parse_config(
        {
            "name": "devices",
            "backbone": {"name": "test_efficientnet", "weights": "random", "image_size": 32},
            "tasks": tasks,
            "methods": ["linear", "head2toe"],
            "grid": {"target_size": [16], "learning_rate": [0.1], "steps": [5], "keep_fraction": [0.1]},
            "cross_validation": {"n_folds": N_FOLDS},
            "resources": {"concurrent_trials": devices, "images_per_forward": 10},
        },
        "devices",
    )


def one_run(
    address: str, root: str, folder: str, overlapped: bool, devices: int, image_seconds: float
) -> None:
    """Extraction and sweep; a process of its own."""
    log = Path(root, "log")
    pack_seconds = image_seconds * N_IMAGES / N_FOLDS  # as long in all as the extraction
    features = replace(extract.STEPS[0], make=partial(slow_features, log, image_seconds))
    run.STAGES["extract"] = (features, *extract.STEPS[1:])
    cross_validation.run_packs = partial(slow_packs, log, pack_seconds)  # type: ignore[assignment]
    cross_validation.LEAST_FLOPS = 0  # as if packs took long by themselves
    if not overlapped:
        run.sweeps_what_comes = lambda session: False  # type: ignore[assignment]
    config = recipe(Path(root), devices)
    run.run_stages(config, folder, ["extract", "sweep"], Console(quiet=True), address)


def busy_share(log: Path, devices: int) -> tuple[float, float]:
    """The share of time in which devices are busy, from the first that is to the last; that time, seconds."""
    spans = [json.loads(path.read_text()) for path in log.iterdir()]
    span = max(end for _, end in spans) - min(start for start, _ in spans)
    return sum(end - start for start, end in spans) / (devices * span), span


def measure(
    address: str, n_runs: int, overlapped: bool, devices: int, image_seconds: float
) -> tuple[float, float]:
    """Share and seconds of so many runs at once on the same devices."""
    with tempfile.TemporaryDirectory() as root:
        Path(root, "log").mkdir()
        for number in range(TASKS):
            write_task(Path(root), f"task{number}", N_IMAGES, 2, seed=number)
        processes = []
        for number in range(n_runs):
            arguments = (address, root, f"{root}/run{number}", overlapped, devices, image_seconds)
            call = f"from tests.benchmarks.devices import one_run; one_run{arguments}"
            processes.append(subprocess.Popen([sys.executable, "-W", "ignore", "-c", call]))
        assert [process.wait() for process in processes] == [0] * n_runs
        return busy_share(Path(root, "log"), devices)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--image-seconds", type=float, default=0.6)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    context = ray.init(
        num_cpus=4 * options.devices, num_gpus=options.devices, include_dashboard=False, log_to_driver=False
    )
    address = context.address_info["gcs_address"]
    table = Table(f"{options.devices} devices", "busy, share of their time", "seconds")
    for n_runs in options.runs:
        for overlapped in (False, True):
            share, seconds = measure(address, n_runs, overlapped, options.devices, options.image_seconds)
            way = "the sweep beside the extraction" if overlapped else "one stage after the other"
            runs = "one run" if n_runs == 1 else f"{n_runs} runs at once"
            table.add_row(f"{runs}, {way}", f"{share:.2f}", f"{seconds:.0f}")
    ray.shutdown()
    Console().print(table)


if __name__ == "__main__":
    main()
