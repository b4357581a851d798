"""Ctrl-C and SIGTERM end a command at once, in one line, so that the same command goes on later."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

SECONDS_TO_END = 6.0  # of the ten that an end may take in all: on a busy machine it begins late


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
    raise Stopped(number)


def end_soon(exit_code: int) -> None:
    """Ignore further signals, and end this process even if the libraries' own ends hang."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    timer = threading.Timer(SECONDS_TO_END, os._exit, [exit_code])
    timer.daemon = True
    timer.start()
