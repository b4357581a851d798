"""All stages in order, on one cluster, into one run directory."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from rich.console import Console

from pipelines.cluster import Cluster, connect
from pipelines.config import Config, fingerprint
from pipelines.evaluate import evaluate
from pipelines.extract import extract, package_versions
from pipelines.finetune import finetune
from pipelines.report import report
from pipelines.run_directory import RunDirectory
from pipelines.sweep import sweep
from pipelines.task_data import TaskData, open_tasks

STAGES: dict[str, Callable[..., Any]] = {
    "extract": extract,
    "sweep": sweep,
    "evaluate": evaluate,
    "finetune": finetune,
    "report": report,
}


def run_stages(
    config: Config, uri: str, stages: Sequence[str], console: Console, address: str | None = None
) -> dict[str, float]:
    """Run some of the stages; wall seconds of each. A stage that is done says so and does nothing."""
    run = RunDirectory(uri)
    works = open_tasks(config)
    write_config(config, run)
    cluster = connect(address)
    return {stage: _timed(STAGES[stage], config, works, run, cluster, console) for stage in stages}


def _timed(
    stage: Callable[..., Any],
    config: Config,
    works: list[TaskData],
    run: RunDirectory,
    cluster: Cluster,
    console: Console,
) -> float:
    started = time.monotonic()
    stage(config, works, run, cluster, console)
    return time.monotonic() - started


def write_config(config: Config, run: RunDirectory) -> None:
    """Write the resolved configuration with its fingerprint and the versions of the packages."""
    content = {
        "fingerprint": fingerprint(config),
        "packages": package_versions(),
        "config": config.model_dump(mode="json"),
    }
    run.write("config.yaml", yaml.safe_dump(content, sort_keys=False).encode())
