"""How far a run is, from its directory alone."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from pipelines.lock import LOCK, locked
from pipelines.products import Gap, RowFiles, Trial
from pipelines.run_directory import RunDirectory
from pipelines.status import StepNote, StepRecorder, by_tasks, status
from tests.pipelines.conftest import invoke


def note(**changes: object) -> StepNote:
    return StepNote("extract", "extract", 0, "images", 100, {"mnist": 60, "pets": 40}, **changes)  # type: ignore[arg-type]


def test_a_running_step_tells_its_rate_and_what_is_left(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    with locked(run), StepRecorder(run, note()) as recorder:
        recorder.note.started -= 20
        recorder.note.updated = 0
        recorder.advance(50, "mnist/train")
        (row,), driver = status(run)
        assert (row.state, row.done) == ("running", "50 of 100 images")
        assert row.rate.startswith("2.")
        assert row.left.startswith("about 2") or row.left == "about 20 s"
        assert row.tasks == "missing: mnist 10, pets 40"
        assert f"process {os.getpid()} on {socket.gethostname()}" in driver


def test_a_step_that_ended_is_done_and_one_that_raised_says_why(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    with StepRecorder(run, note()) as recorder:
        recorder.advance(100, "mnist/train")
    failed = StepNote("sweep", "sweep", 10, "trials", 8)
    with pytest.raises(ValueError, match="no room"), StepRecorder(run, failed):
        raise ValueError("no room\nmore of it")
    rows, driver = status(run)
    assert [(row.stage, row.state) for row in rows] == [("extract", "done"), ("sweep", "failed")]
    assert rows[1].tasks == "no room"
    assert driver == "No driver is at work."


def test_a_step_of_a_driver_that_died_is_stopped(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    now = time.time()
    run.write_json("status/00-extract-extract.json", vars(note(started=now - 100, updated=now - 50, done=10)))
    dead = {"host": socket.gethostname(), "process": 1, "started": -1, "token": "", "renewed": now - 50}
    run.write(LOCK, json.dumps(dead).encode())
    (row,), driver = status(run)
    assert row.state == "stopped"
    assert row.left == ""
    assert "ended without a word; the same command goes on" in driver


def test_units_of_every_kind_name_their_task() -> None:
    files = RowFiles("features", "0123", "pets", "train", 10, 16, "extract")
    trial = Trial("mnist", 0, None, "", "", "")  # type: ignore[arg-type]
    assert set(by_tasks([Gap(files, 0, 5), trial, "kitti", ("scaling", "dtd")])) == {
        "pets",
        "mnist",
        "kitti",
        "dtd",
    }


def test_the_command_shows_a_finished_run(finished: RunDirectory) -> None:
    code, shown = invoke("status", finished.uri)
    assert code == 0
    for stage in ("extract", "sweep", "heads", "evaluate"):
        assert stage in shown
    assert "50 of 50 images" in shown
    assert "No driver is at work." in shown


def test_a_directory_without_a_run_says_so(tmp_path: Path) -> None:
    assert f"Nothing has been run into {tmp_path}." in invoke("status", str(tmp_path))[1].replace("\n", "")
