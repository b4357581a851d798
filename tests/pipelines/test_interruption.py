"""Ctrl-C and SIGTERM at any moment: one line, the right exit status, nothing left behind, and it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pipelines.run_directory import RunDirectory
from tests.pipelines.conftest import commands_of, result_rows, run_all, small_config

ROOT = Path(__file__).parents[2]
MOMENTS = ("run.yaml", "features/**/*.parquet", "trials/**/*.parquet", "heads/**/*.safetensors")
SOME = MOMENTS[3:]
SECONDS = 10  # the longest that an end may take, on a busy machine too


@pytest.mark.parametrize(
    ("number", "moments"),
    [
        (signal.SIGINT, SOME),
        pytest.param(signal.SIGINT, MOMENTS, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, MOMENTS, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(400)
def test_signals_end_a_run_in_one_line_and_it_goes_on(
    images: Path, tmp_path: Path, number: signal.Signals, moments: tuple[str, ...]
) -> None:
    config = small_config(images, ("first",), methods=["linear", "head2toe"])
    folder, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "pipelines", "run", str(recipe), "--run-dir", str(folder)]
    for moment in moments:
        if moment != "run.yaml" and list(folder.glob(moment)):
            continue
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while not list(folder.glob(moment)) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        started = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - started < SECONDS
        assert process.returncode == 128 + number, moment
        assert errors.splitlines() == [
            f"stopped by {number.name}; what was done is kept: the same command goes on"
        ]
        deadline = time.monotonic() + 30
        while (left := [*commands_of(process.pid).values()]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == [], moment
        assert not (folder / "lock.json").exists()
        assert not list(folder.rglob(".tmp-*")) or moment != "run.yaml"
    run_all(config, RunDirectory(str(folder)))
    undisturbed = RunDirectory(str(tmp_path / "undisturbed"))
    run_all(config, undisturbed)
    pd.testing.assert_frame_equal(result_rows(RunDirectory(str(folder))), result_rows(undisturbed))
    assert not list(folder.rglob(".tmp-*"))
    assert os.listdir(folder)


def test_an_end_that_hangs_is_cut_short_with_the_line(tmp_path: Path) -> None:
    program = """
import time
from pipelines import cli, interruption
interruption.SECONDS_TO_END = 1.0
def answer():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(60)
cli._answer = answer
cli.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert errors == "stopped by SIGTERM; what was done is kept: the same command goes on\n"
