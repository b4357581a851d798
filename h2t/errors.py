"""Errors caused by user input, with what was expected and the closest valid name."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what the user gave; shown as one message, never as a traceback."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """The error for a name that is not among ``choices``, with the nearest ones first."""
    known = list(dict.fromkeys(choices))
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(f"unknown {kind} '{name}': {hint}expected one of {', '.join(known)}")
