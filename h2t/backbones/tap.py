"""A place in a network whose activation gives features."""

from dataclasses import dataclass
from typing import Literal

Form = Literal["map", "map_channels_last", "tokens", "vector", "first_token"]


@dataclass(frozen=True)
class Tap:
    """A place in a network whose activation gives features.

    ``name``: the column it fills; ``module``: where the hook goes, "" being the whole model; ``form``: "map"
    [b, c, h, w], "map_channels_last" [b, h, w, c], "tokens" [b, t, c], "first_token" (the same, of which only
    the first is read) or "vector" [b, c] with any trailing axes of 1; ``point``: what the module returns or
    what it is given; ``call``: which of the module's calls in a forward pass; ``prepend``: a parameter of the
    model [1, 1, c] that is put before the tokens.
    """

    name: str
    module: str
    form: Form
    point: Literal["output", "input"] = "output"
    call: int = 0
    prepend: str = ""
