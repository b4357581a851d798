"""Progress on anything that lasts: a bar on a terminal, plain lines with counts and rates elsewhere."""

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """A time in the unit that suits it, as 85 s, 12 min or 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class _Bars:
    """The bars of one console: stages that run side by side share its live display."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shown: dict[Console, Progress] = {}

    def add(self, console: Console, stage: str, total: int) -> tuple[Progress, TaskID]:
        """A new bar, and the display that it is in."""
        with self.lock:
            bars = self.shown.get(console)
            if bars is None:
                bars = self.shown[console] = Progress(
                    TextColumn("{task.description:<9}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[rate]}"),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}"),
                    console=console,
                    disable=not console.is_terminal,
                    transient=True,
                )
                bars.start()
            return bars, bars.add_task(stage, total=total, rate="", note="")

    def remove(self, console: Console, bar: TaskID) -> None:
        """Take a bar away, and the display with the last one."""
        with self.lock:
            bars = self.shown[console]
            bars.remove_task(bar)
            if not bars.task_ids:
                bars.stop()
                del self.shown[console]


_BARS = _Bars()


class StageProgress:
    """Counts the units of one stage; a context manager that ends with one line of what was done."""

    def __init__(self, console: Console, stage: str, total: int, unit: str) -> None:
        self.console, self.stage, self.total, self.unit = console, stage, total, unit
        self.done, self.started, self.printed = 0, time.monotonic(), time.monotonic()

    def __enter__(self) -> "StageProgress":
        self.bars, self.bar = _BARS.add(self.console, self.stage, self.total)
        return self

    def advance(self, count: int, note: str = "") -> None:
        """Count ``count`` more units; ``note`` says where they were."""
        self.done += count
        self.bars.update(self.bar, advance=count, rate=self._rate(), note=note)
        if not self.console.is_terminal and time.monotonic() - self.printed > LINE_EVERY_S:
            self.printed = time.monotonic()
            self.console.print(f"{self.stage}: {note}  {self.done}/{self.total} {self.unit}  {self._rate()}")

    def show(self, note: str, done: int, total: int) -> None:
        """Say how far the work is, where its end is not known beforehand."""
        self.total = total
        self.bars.update(self.bar, total=total)
        self.advance(done - self.done, note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _BARS.remove(self.console, self.bar)
        if kind is None:
            seconds = time.monotonic() - self.started
            self.console.print(f"{self.stage:<9} {self.done} {self.unit} in {seconds:.0f} s ({self._rate()})")

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        short = {"images": "img"}.get(self.unit, self.unit)
        if 0 < rate < 0.5:
            return f"{1 / rate:.2g} s per {self.unit.removesuffix('s')}"
        return f"{rate:.0f} {short}/s" if rate >= 10 else f"{rate:.2g} {short}/s"
