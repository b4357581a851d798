"""Ctrl-C and SIGTERM end a command at once, in one line, so that the same command goes on later."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

SECONDS_TO_END = 8.0  # from the signal on; of the ten that an end may take, which begins late where busy


class Stopped(BaseException):
    """A signal has asked the command to end. Nothing but ``main`` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As a shell has it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number

    @property
    def name(self) -> str:
        """The signal's."""
        return signal.Signals(self.number).name


def signal_behind(error: BaseException | None) -> Stopped | None:
    """The signal that an exception goes back to: compiled code wraps what a handler raises in it."""
    if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
        return Stopped(signal.SIGTERM)  # by the handler that Ray has in place while it starts
    return next((cause for cause in causes(error) if isinstance(cause, Stopped)), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_installed = False


def stop_on_signals() -> None:
    """Have SIGINT and SIGTERM raise ``Stopped`` in the main thread from now on."""
    global _installed
    _installed = True
    reinstall()


def reinstall() -> None:
    """Take the signals back from a library that has put handlers of its own in place."""
    if _installed and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)


def _stop(number: int, frame: Any) -> None:
    stopped = Stopped(number)
    end_soon(stopped)
    raise stopped


_ending = threading.Event()  # once a timer runs
_said = threading.Lock()  # held once the line is on the screen


def end_soon(stopped: Stopped) -> None:
    """End this process in a while even if the work, or a library's own end, hangs meanwhile."""
    if _ending.is_set():
        return
    _ending.set()
    timer = threading.Timer(SECONDS_TO_END, _end, [stopped])
    timer.daemon = True
    timer.start()


def _end(stopped: Stopped) -> None:
    say(stopped)
    os._exit(stopped.exit_code)


def say(stopped: Stopped) -> None:
    """The line that a stopped command ends with, once."""
    if _said.acquire(blocking=False):
        sys.stderr.write(f"stopped by {stopped.name}; what was done is kept: the same command goes on\n")
        sys.stderr.flush()


def ignore_signals() -> None:
    """Let further signals pass: the end has begun."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
