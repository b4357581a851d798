"""One real Ray for the whole session, and small image tasks on disk."""

import io
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

from pipelines.cli import app
from pipelines.cluster import Cluster
from pipelines.config import Config
from pipelines.connection import connect
from pipelines.recipe import parse_config
from pipelines.report import report
from pipelines.run import STAGES, run_stages
from pipelines.run_directory import RunDirectory


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    import ray

    yield connect(cores=2)
    ray.shutdown()


@pytest.fixture
def short_folder() -> Iterator[str]:
    """Ray keeps sockets in its folder, whose paths may have 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def run_all(config: Config, run: RunDirectory, console: Console | None = None) -> None:
    """All stages and the report, as ``h2t run`` has them."""
    console = console or Console(quiet=True)
    run_stages(config, run.uri, list(STAGES), console)
    report([run], run.subdirectory("report"), console)


def frame(run: RunDirectory, kind: str) -> pd.DataFrame:
    """All rows of one kind of table, as any reader of Parquet gets them."""
    return pd.read_parquet(f"{run.uri}/{kind}")


MEASURED = ["train_seconds", "peak_memory_bytes"]


def result_rows(run: RunDirectory) -> pd.DataFrame:
    """The result rows without what is measured, in a fixed order."""
    rows = frame(run, "results").drop(columns=MEASURED)
    return rows.sort_values(["task", "method", "seed"]).reset_index(drop=True)


def output(console: Console) -> str:
    """What a console that writes to memory has shown."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit status and output of the command line, in this process."""
    found = CliRunner().invoke(app, list(arguments))
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.output


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_task(root: Path, name: str, n_train: int = 20, n_test: int = 12, seed: int = 0) -> None:
    """A task of two classes told apart by their brightness, as Parquet with image bytes."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", n_train), ("test", n_test)):
        labels = np.arange(count) % 2
        images = [
            png(generator.integers(0, 120, (20, 24, 3), np.uint8) + np.uint8(100 * label)) for label in labels
        ]
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image_bytes": images, "label": labels}), folder / f"{split}.parquet")


def small_config(root: Path, tasks: Sequence[Any] = ("first", "second"), **settings: Any) -> Config:
    """A recipe on tasks of :func:`write_task`, or others, with a tiny backbone with random weights."""
    listed = [
        task
        if isinstance(task, dict)
        else {
            "name": task,
            "n_classes": 2,
            "group": group,
            "images": {"format": "parquet", "root": str(root / task)},
        }
        for task, group in zip(tasks, ("natural", "structured"), strict=False)
    ]
    data = {
        "name": "small",
        "backbone": {"name": "test_efficientnet", "weights": "random", "image_size": 32},
        "tasks": listed,
        "grid": {
            "target_size": [16, 64],
            "learning_rate": [0.1],
            "steps": [5, 10],
            "coefficient": [1e-5],
            "head2toe_coefficient": [1e-5],
            "keep_fraction": [0.05, 0.2],
        },
        "cross_validation": {"n_folds": 2},
        "seeds": [0, 1],
        # One worker of each kind: starting a process takes longer than all the work of such a run.
        "resources": {"shard_size": 8, "images_per_forward": 4, "actors": 1, "concurrent_trials": 1},
    }
    for key, value in settings.items():
        data[key] = {**data[key], **value} if isinstance(data.get(key), dict) else value  # type: ignore[dict-item]
    return parse_config(data, "test")


def kill_workers(title: bytes) -> int:
    """Kill the workers of this process's Ray whose title has these words; how many there were."""
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            pid, command = int(process.name), process.joinpath("cmdline").read_bytes()
            # Workers are children of the raylet, which is a child of this process.
            if title in command and parent(parent(pid)) == os.getpid():
                os.kill(pid, signal.SIGKILL)
                killed += 1
    return killed


def commands_of(session: int) -> dict[int, str]:
    """The processes of a session that have not ended: number and command."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, "first" and "second"."""
    root = tmp_path_factory.mktemp("images")
    write_task(root, "first")
    write_task(root, "second", n_train=30, n_test=9, seed=1)
    return root


@pytest.fixture(scope="session")
def finished(images: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """An undisturbed run of the small recipe; a test that changes its files leaves them as they were."""
    run = RunDirectory(str(tmp_path_factory.mktemp("run")))
    run_all(small_config(images), run)
    return run
