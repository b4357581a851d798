"""The one way for a user's mistake to leave a worker: as text in what the worker returns.

Ray Data and Ray Tune turn an exception of a worker into text with a traceback, so that its type is lost, and
run the work again, to the same end. So a worker catches a UserError, and the driver raises it again.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import ray

from h2t.errors import UserError


class OfTask(Protocol):
    """A unit of a task's work."""

    @property
    def task(self) -> str: ...


Unit = TypeVar("Unit", bound=OfTask)


def user_error_of(work: Callable[[], object]) -> str:
    """Do the work; the text of the UserError that it raised, or "" where it went well."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def raise_user_error(texts: Iterable[str]) -> None:
    """Raise the first text that is not empty as a UserError."""
    for text in texts:
        if text:
            raise UserError(text)


def as_finished(pending: dict[ray.ObjectRef, list[Unit]], doing: str) -> Iterator[list[Unit]]:
    """The units of Ray tasks that return texts of user's mistakes, as these end.

    Raises UserError for a mistake, and where workers died, one after the other; ``doing``: what they did.
    """
    while pending:
        (finished,), _ = ray.wait(list(pending), num_returns=1)
        units = pending.pop(finished)
        try:
            raise_user_error([ray.get(finished)])
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            raise UserError(
                f"{units[0].task}: three workers died while they {doing} ({str(error).splitlines()[0]}); if "
                "memory ran out, lower resources.memory_per_trial_gb or leave out the largest "
                "grid.target_size"
            ) from None
        yield units
