"""A run killed at any moment and run again does what is missing and ends as an undisturbed one."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console

from pipelines.config import Config
from pipelines.run import STAGES, run_stages
from pipelines.run_directory import RunDirectory
from tests.pipelines.conftest import kill_workers, small_config
from tests.pipelines.test_pipeline import digests, result_rows

pytestmark = pytest.mark.usefixtures("cluster")
ROOT = Path(__file__).parents[2]


def start(config: Config, folder: Path) -> subprocess.Popen[bytes]:
    """The command line in a process group of its own, with a Ray of its own."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "pipelines", "run", str(recipe), "--run-dir", str(folder / "run")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)


def wait_for(run: RunDirectory, stage: str, process: subprocess.Popen[bytes]) -> None:
    while not [
        name for name in run.names(stage, recursive=True) if name.endswith(("parquet", "safetensors"))
    ]:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)


@pytest.mark.timeout(300)
def test_killed_in_every_stage_and_run_again(finished: RunDirectory, images: Path, tmp_path: Path) -> None:
    config, killed = small_config(images), RunDirectory(str(tmp_path / "run"))
    for stage in ("features", "trials"):
        process = start(config, tmp_path)
        wait_for(killed, stage, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (tmp_path / "run" / "trials" / ".tmp-left-behind").write_bytes(b"half a file")
    before = {
        name: Path(killed.uri, name).stat().st_mtime_ns for name in killed.names("features", recursive=True)
    }
    run_stages(config, killed.uri, list(STAGES), Console(quiet=True))
    after = {name: Path(killed.uri, name).stat().st_mtime_ns for name in before}
    assert {name for name in before if before[name] != after[name] and name.endswith("parquet")} == set()
    (tmp_path / "run" / "trials" / ".tmp-left-behind").unlink()
    assert digests(killed) == digests(finished)
    pd.testing.assert_frame_equal(result_rows(killed), result_rows(finished))


def test_killed_workers_are_replaced(finished: RunDirectory, images: Path, tmp_path: Path) -> None:
    """One of each kind: a backbone actor, a trial and a task that trains final heads."""
    run = RunDirectory(str(tmp_path))

    def kill() -> None:
        for title in (b"ShardActor", b"ray::ImplicitFunc", b"ray::_train_heads"):
            while not kill_workers(title):
                time.sleep(0.02)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run_stages(small_config(images), run.uri, list(STAGES), Console(quiet=True))
    killer.join(timeout=0)
    assert not killer.is_alive(), "the run ended before a worker of each kind could be killed"
    assert digests(run) == digests(finished)
    pd.testing.assert_frame_equal(result_rows(run), result_rows(finished))
