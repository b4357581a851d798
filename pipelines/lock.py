"""One driver per run directory: a lock that says who holds it, and that a dead driver cannot keep.

The lock is a small JSON file whose holder renews it. On a local disk it appears by an exclusive creation; an
object store has none, so there the one whose lock stands after a moment holds it.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from h2t.errors import UserError
from pipelines.run_directory import RunDirectory, Unreachable

LOCK = "lock.json"
RENEWED_EVERY_S = 10.0
DEAD_AFTER_S = 60.0  # without a renewal, of a holder that cannot be looked at from here
SETTLED_AFTER_S = 1.0
_held: set[str] = set()  # tokens of this process: a lock of another one is left from a store that was away


@contextmanager
def locked(run: RunDirectory) -> Iterator[None]:
    """Hold a run directory while the body runs.

    Raises UserError that names the holder where another process, here or elsewhere, is at work in it.
    """
    mine = {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid()),
            "token": uuid.uuid4().hex, "renewed": time.time()}  # fmt: skip
    _take(run, mine)
    _held.add(str(mine["token"]))
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(run, mine, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _held.remove(str(mine["token"]))
        with suppress(Unreachable):  # then the lock is a dead driver's; what the body raised matters more
            if (holder := holder_of(run)) and holder["token"] == mine["token"]:
                run.delete(LOCK)


def _take(run: RunDirectory, mine: dict[str, Any]) -> None:
    while not run.create(LOCK, _text(mine)):
        holder = holder_of(run)
        if holder is None:  # given back meanwhile
            continue
        if is_alive(holder):
            raise UserError(
                f"{run.uri} is in use: process {holder['process']} on {holder['host']} works in it and was "
                f"there {time.time() - holder['renewed']:.0f} s ago; wait for its end, stop it, or run into "
                "another directory"
            )
        with suppress(FileNotFoundError):
            run.delete(LOCK)  # of a dead driver
    if not run.local:
        time.sleep(SETTLED_AFTER_S)
        if (holder := holder_of(run)) and holder["token"] != mine["token"]:
            raise UserError(
                f"{run.uri} is in use: process {holder['process']} on {holder['host']} took it just before"
            )


def _renew(run: RunDirectory, mine: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(RENEWED_EVERY_S):
        with suppress(UserError):  # a store that is away for a while is no reason to stop
            run.write(LOCK, _text(mine | {"renewed": time.time()}))


def holder_of(run: RunDirectory) -> dict[str, Any] | None:
    """What the lock says; None where there is none. A lock that cannot be read is a dead driver's.

    ``host``, ``process``, ``started`` (ticks), ``token``, ``renewed`` (seconds since 1970).
    """
    try:
        content: dict[str, Any] = json.loads(run.read(LOCK))
    except FileNotFoundError:
        return None
    except Unreachable:
        raise
    except ValueError:
        content = {}
    unknown = {"host": "an unknown host", "process": 0, "started": 0, "token": "", "renewed": 0.0}
    return unknown | content


def is_alive(holder: dict[str, Any]) -> bool:
    """Whether the holder is at work: its process is there, or, elsewhere, it gave a sign lately."""
    if holder["host"] == socket.gethostname() and holder["process"] == os.getpid():
        return holder["token"] in _held
    if holder["host"] == socket.gethostname() and Path("/proc").is_dir():
        return holder["process"] > 0 and _started(holder["process"]) == holder["started"]
    return bool(time.time() - holder["renewed"] < DEAD_AFTER_S)


def _started(process: int) -> int:
    """When a process of this machine started, in ticks of its clock: a new one is told from an old one.

    0 for one that is not there.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] == "Z" else int(fields[19])


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
