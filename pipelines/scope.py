"""What of a task's features a head is trained on: all, or a part that a study asks for."""

from dataclasses import dataclass

from h2t.methods import METHODS


@dataclass(frozen=True)
class Scope:
    """A part of a task's features.

    ``taps``: those whose features are candidates, in network order; ``shots``: training images of each class;
    None: all. ``kept_on``: the task whose Head2Toe heads have chosen the features, seed by seed.
    """

    taps: tuple[str, ...] | None = None
    shots: int | None = None
    kept_on: str | None = None


EVERYTHING = Scope()


def reads_by_tap(method: str, scope: Scope) -> bool:
    """Whether a head reads features tap by tap, beginning with their products, which are of all features."""
    return METHODS[method].by_tap and scope.taps is None and scope.kept_on is None
