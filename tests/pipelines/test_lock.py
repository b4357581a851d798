"""One driver per run directory, on a disk and in an object store."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from h2t.errors import UserError
from pipelines import lock
from pipelines.lock import LOCK, locked
from pipelines.run_directory import RunDirectory


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    if request.param == "local":
        return RunDirectory(str(tmp_path))
    monkeypatch.setattr(lock, "SETTLED_AFTER_S", 0.05)
    endpoint = request.getfixturevalue("s3")
    return RunDirectory(
        f"s3://runs/{tmp_path.name}?endpoint_override={endpoint}&scheme=http&allow_bucket_creation=true"
    )


def test_a_second_driver_is_refused_and_told_of_the_first(run: RunDirectory) -> None:
    with (
        locked(run),
        pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}"),
        locked(run),
    ):
        pass
    assert not run.exists(LOCK)
    with locked(run):  # given back
        assert run.exists(LOCK)


def test_an_error_gives_the_lock_back(run: RunDirectory) -> None:
    with pytest.raises(ZeroDivisionError), locked(run):
        _ = 1 / 0
    assert not run.exists(LOCK)


def test_the_lock_of_a_dead_process_is_taken_over(run: RunDirectory) -> None:
    script = (
        "import os, signal, sys\n"
        "from pipelines.lock import locked\n"
        "from pipelines.run_directory import RunDirectory\n"
        "with locked(RunDirectory(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, run.uri], check=False, timeout=60)
    assert json.loads(run.read(LOCK))["process"] != os.getpid()
    with locked(run):
        assert json.loads(run.read(LOCK))["process"] == os.getpid()


def holder(age: float, **changes: object) -> bytes:
    there = {"host": "elsewhere", "process": 1, "started": 1, "token": "x", "renewed": time.time() - age}
    return json.dumps(there | changes).encode()


@pytest.mark.parametrize(
    ("make", "free"),
    [
        (lambda: holder(0), False),
        (lambda: holder(1000), True),
        (lambda: holder(0, host=socket.gethostname(), process=1, started=-1), True),
        (lambda: b"", True),
        (lambda: b'{"host"', True),
    ],
    ids=["elsewhere, alive", "elsewhere, silent", "here, another process", "empty", "damaged"],
)
def test_who_is_elsewhere_counts_by_its_last_sign(
    run: RunDirectory, make: Callable[[], bytes], free: bool
) -> None:
    content = make()
    run.write(LOCK, content)
    if free:
        with locked(run):
            pass
    else:
        with pytest.raises(UserError, match="process 1 on elsewhere works in it"), locked(run):
            pass
        assert run.read(LOCK) == content


def test_a_holder_gives_signs_of_life(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEWED_EVERY_S", 0.02)
    with locked(run):
        first = json.loads(run.read(LOCK))["renewed"]
        deadline = time.monotonic() + 20
        while json.loads(run.read(LOCK))["renewed"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    run, barrier, refused = RunDirectory(str(tmp_path)), threading.Barrier(8), []
    inside = threading.Semaphore(1)
    done = threading.Event()

    def take() -> None:
        barrier.wait()
        try:
            with locked(run):
                assert inside.acquire(blocking=False)
                done.wait(20)
                inside.release()
        except UserError as error:
            refused.append(str(error))
            if len(refused) == 7:
                done.set()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    assert not list(tmp_path.iterdir())
