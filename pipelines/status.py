"""How far a run is: what its driver notes of every step, and the table that ``h2t status`` makes of it.

A step's note is a small JSON file under ``status/``, renewed while the step lasts. So the table needs the run
directory alone: no recipe, no images, no cluster.
"""

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from h2t.errors import UserError
from pipelines.lock import holder_of, is_alive
from pipelines.progress import duration
from pipelines.run_directory import RunDirectory

FOLDER = "status"
NOTE = re.compile(rf"{FOLDER}/\d\d-[^/]+\.json")
NOTED_EVERY_S = 5.0


@dataclass
class StepNote:
    """What is known of one step; times are seconds since 1970, 0 for what has not happened.

    ``total``: units that were missing when it began, by task in ``missing``; ``done``: of these, by task in
    ``finished``; ``error``: the first line of what ended it early.
    """

    stage: str
    step: str
    position: int
    unit: str
    total: int
    missing: dict[str, int] = field(default_factory=dict)
    done: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    started: float = 0.0
    updated: float = 0.0
    ended: float = 0.0
    error: str = ""


class StepRecorder:
    """Writes the note of a step as it goes; a context manager."""

    def __init__(self, run: RunDirectory, note: StepNote) -> None:
        self.run, self.note = run, note

    def __enter__(self) -> "StepRecorder":
        self.note.started = time.time()
        self._write()
        return self

    def advance(self, count: int, place: str = "") -> None:
        """Count units that are done; ``place`` begins with the task."""
        self.note.done += count
        task = place.partition("/")[0]
        self.note.finished[task] = self.note.finished.get(task, 0) + count
        if time.time() - self.note.updated > NOTED_EVERY_S:
            with suppress(UserError):  # of a disk or store that the work itself will stumble over
                self._write()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.note.ended = time.time()
        self.note.error = "" if error is None else (str(error) or type(error).__name__).splitlines()[0]
        with suppress(*([UserError] if error else [])):  # what has ended the step matters more
            self._write()

    def _write(self) -> None:
        self.note.updated = time.time()
        self.run.write_json(f"{FOLDER}/{self.note.position:02d}-{self.note.stage}-{slug(self.note.step)}.json",
                            asdict(self.note))  # fmt: skip


def slug(title: str) -> str:
    """A step's title as part of a file name."""
    return title.replace(" ", "-")


def by_tasks(units: Sequence[Any]) -> dict[str, list[Any]]:
    """Units by task: they name it, or are of files that do, or are its name."""
    found: dict[str, list[Any]] = {}
    for unit in units:
        found.setdefault(_task(unit), []).append(unit)
    return found


def _task(unit: Any) -> str:
    if isinstance(unit, str):
        return unit
    if isinstance(unit, tuple):
        return str(unit[-1])
    return str(getattr(unit, "task", None) or getattr(getattr(unit, "files", None), "task", ""))


@dataclass(frozen=True)
class StatusRow:
    """A row of the table: texts for readers."""

    stage: str
    step: str
    state: str
    done: str
    rate: str
    left: str
    tasks: str


def status(run: RunDirectory, now: float | None = None) -> tuple[list[StatusRow], str]:
    """The steps that a run has begun, in their order, and a sentence on whether somebody is at work."""
    now = time.time() if now is None else now
    notes = [StepNote(**run.read_json(name)) for name in run.names(FOLDER) if NOTE.fullmatch(name)]
    holder = holder_of(run)
    at_work = holder is not None and is_alive(holder)
    rows = [_row(note, at_work, now) for note in sorted(notes, key=lambda note: note.position)]
    if holder is None:
        return rows, "No driver is at work."
    who = f"process {holder['process']} on {holder['host']}"
    if at_work:
        return rows, f"The driver is {who}, last seen {now - holder['renewed']:.0f} s ago."
    return rows, f"The driver, {who}, ended without a word; the same command goes on."


def _row(note: StepNote, at_work: bool, now: float) -> StatusRow:
    running = at_work and not note.ended
    seconds = max((now if running else note.ended or note.updated) - note.started, 1e-9)
    rate = note.done / seconds
    state = (
        "running" if running
        else "failed" if note.error
        else "done" if note.ended
        else "stopped"
    )  # fmt: skip
    left = (note.total - note.done) / rate if running and rate else 0.0
    lacking = {task: n - note.finished.get(task, 0) for task, n in note.missing.items()}
    waiting = ", ".join(f"{task} {n:,}" for task, n in lacking.items() if n > 0 and task)
    tasks = note.error or (f"missing: {waiting}" if waiting and state != "done" else "")
    return StatusRow(
        note.stage,
        note.step,
        state,
        f"{note.done:,} of {note.total:,} {note.unit}" if note.total else f"all {note.unit} were there",
        f"{rate:.3g}/s" if note.done else "",
        f"about {duration(left)}" if left else "",
        tasks,
    )
