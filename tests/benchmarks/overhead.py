"""What Ray Tune and Ray Data take for a unit of work that does nothing.

    python -m tests.benchmarks.overhead [--units 1000 10000]

The same calls as in a run: jobs as trials of Tune on reused actors, two side by side; shards through Ray
Data, a decoding task and an actor each.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from rich.console import Console
from tabulate import tabulate

from pipelines.jobs import Job, run_jobs
from pipelines.recipe import parse_config
from pipelines.run_directory import RunDirectory
from pipelines.session import Session


def nothing(work: Any, shared: Any) -> Iterator[dict[str, Any]]:
    """A trial that reports a number."""
    yield {"value": work}


class Nothing:
    """An actor that hands a batch on."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch


def tune_seconds(session: Session, n_units: int) -> float:
    """Wall time of so many empty trials."""
    jobs = [Job(f"job-{number}", {"number": number}, number) for number in range(n_units)]
    started = time.perf_counter()
    run_jobs(
        session, "empty", jobs, nothing, None, resources={"cpu": 1}, concurrent=2, on_done=lambda job: None
    )
    return time.perf_counter() - started


def data_seconds(n_units: int) -> float:
    """Wall time of so many empty shards."""
    DataContext.get_current().enable_progress_bars = False
    started = time.perf_counter()
    pipeline = (
        ray.data.from_items([{"shard": number} for number in range(n_units)], override_num_blocks=n_units)
        .map_batches(lambda batch: batch, batch_size=1, batch_format="pyarrow", num_cpus=1)
        .map_batches(
            Nothing, batch_size=1, batch_format="pyarrow", compute=ActorPoolStrategy(size=1), num_cpus=1
        )
    )
    assert sum(1 for _ in pipeline.iter_rows()) == n_units
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", type=int, nargs="+", default=[1000, 10000])
    given = parser.parse_args()
    backbone = {"name": "test_efficientnet", "weights": "random"}
    config = parse_config({"name": "empty", "backbone": backbone, "tasks": ["mnist"]}, "empty")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(config, RunDirectory(folder), Console(quiet=True))
        _ = session.cluster
        tune_seconds(session, 4), data_seconds(4)  # the first of each loads what it needs
        for n_units in given.units:
            for name, seconds in (("Tune", tune_seconds(session, n_units)), ("Data", data_seconds(n_units))):
                rows.append({"": name, "units": n_units, "s": seconds, "ms a unit": 1000 * seconds / n_units})
                print(rows[-1], flush=True)
    print(tabulate(rows, headers="keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
