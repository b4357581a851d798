"""The one way for a user's mistake to leave a worker: as text in what the worker returns.

Ray Data and Ray Tune turn an exception of a worker into text with a traceback, so that its type is lost, and
run the work again, to the same end. So a worker catches a UserError, and the driver raises it again.
"""

from collections.abc import Callable, Iterable

from h2t.errors import UserError


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
