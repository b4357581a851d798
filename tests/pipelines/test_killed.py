"""A run killed at any moment and run again does what is missing and ends as an undisturbed one."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pipelines.config import Config
from pipelines.run_directory import RunDirectory
from tests.pipelines.conftest import kill_workers, run_all, small_config
from tests.pipelines.test_pipeline import digests, result_rows

pytestmark = pytest.mark.usefixtures("cluster")
ROOT = Path(__file__).parents[2]


def start(config: Config, folder: Path) -> subprocess.Popen[bytes]:
    """The command line in a process group of its own, with a Ray of its own."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "pipelines", "run", str(recipe), "--run-dir", str(folder / "run")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)


# A file of each, in the order in which a run makes them: a run is killed as soon as it is there.
MOMENTS = (
    "features/**/*.parquet", "trials/**/frozen/*.parquet", "heads/**/frozen/*.safetensors",
    "predictions/**/frozen/*.parquet", "trials/**/finetuned/*.parquet", "heads/**/finetuned/*.safetensors",
    "predictions/**/finetuned/*.parquet", "report/*.md",
)  # fmt: skip


@pytest.mark.parametrize(
    ("methods", "moments"),
    [
        (["linear", "head2toe"], MOMENTS[1:2]),
        pytest.param(["linear", "head2toe", "scratch"], MOMENTS, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(400)
def test_killed_in_every_stage_and_run_again(
    images: Path, tmp_path: Path, methods: list[str], moments: tuple[str, ...]
) -> None:
    finetune = {"learning_rate": [0.1], "steps": [2], "batch_size": 8, "folds": 0}
    config = small_config(images, ("first",), methods=methods, finetune=finetune)
    folder, undisturbed = tmp_path / "run", RunDirectory(str(tmp_path / "undisturbed"))
    killed, n_killed = RunDirectory(str(folder)), 0
    for moment in moments:
        if list(folder.glob(moment)):
            continue  # of steps that follow each other within a moment
        process = start(config, tmp_path)
        while not list(folder.glob(moment)) and process.poll() is None:
            time.sleep(0.01)
        n_killed += process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert n_killed >= (len(moments) + 1) // 2
    leftover = folder / "trials" / "test_efficientnet" / "first" / "frozen" / ".tmp-left-behind"
    leftover.write_bytes(b"half a file")
    before = {path: path.stat().st_mtime_ns for path in (folder / "features").rglob("*.parquet")}
    run_all(config, killed)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "features").rglob("*.parquet")}
    assert not leftover.exists()
    run_all(config, undisturbed)
    assert digests(killed) == digests(undisturbed)
    pd.testing.assert_frame_equal(result_rows(killed), result_rows(undisturbed))


@pytest.mark.slow
def test_killed_workers_are_replaced(finished: RunDirectory, images: Path, tmp_path: Path) -> None:
    """One of each kind: a backbone actor, a trial and a task that trains final heads."""
    run = RunDirectory(str(tmp_path))

    def kill() -> None:
        for title in (b"ShardActor", b"ray::ImplicitFunc", b"ray::train_together"):
            while not kill_workers(title):
                time.sleep(0.02)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run_all(small_config(images), run)
    killer.join(timeout=0)
    assert not killer.is_alive(), "the run ended before a worker of each kind could be killed"
    assert digests(run) == digests(finished)
    pd.testing.assert_frame_equal(result_rows(run), result_rows(finished))
