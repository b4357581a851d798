"""What of a task's features a head is trained on: all, or a part that a study asks for."""

from dataclasses import dataclass


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
