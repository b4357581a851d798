"""How the activation of a tap becomes features: what a user may choose. It knows no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from h2t.errors import unknown

ClassToken = Literal["normal", "only_cls", "nopool_cls"]
Tokens = Literal["sequence", "grid"]
Pooling = Literal["average", "average_max", "average_std", "pyramid"]

CLASS_TOKEN_TREATMENTS: tuple[ClassToken, ...] = get_args(ClassToken)
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True)
class Aggregation:
    """How the positions of an activation become about ``target_size`` features; the defaults are the paper's.

    ``cls_token`` (Table 7): "normal" pools the class token like any other, "only_cls" takes it alone,
    "nopool_cls" puts it before the pooled others.

    ``tokens``: "sequence" pools tokens in one dimension, which the paper does and calls "unlikely to be the
    best choice" (Section 4); "grid" puts those of patches back into their rows and columns and pools them as
    a map. Class and register tokens have no place there: both "normal" and "nopool_cls" put them before the
    pooled others, each as it is. Tokens that make no square stay a sequence.

    ``pooling``: "average" of each window; "average_max" and "average_std" have its maximum or its standard
    deviation (that of the population) too, behind the averages of all windows, and so twice as many features,
    but for windows of one position; "pyramid" has the averages of everything, then of 2, 4, 8 … windows a
    side, while such a level has no more than ``target_size`` features. These windows leave nothing out; where
    the side is no multiple of their number, neighbours share a position.

    Raises UserError for anything else.
    """

    cls_token: ClassToken = "normal"
    tokens: Tokens = "sequence"
    pooling: Pooling = "average"

    def __post_init__(self) -> None:
        for kind, value, choices in (
            ("treatment of the class token", self.cls_token, CLASS_TOKEN_TREATMENTS),
            ("arrangement of tokens", self.tokens, get_args(Tokens)),
            ("pooling", self.pooling, POOLINGS),
        ):
            if value not in choices:
                raise unknown(kind, value, choices)

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "Aggregation":
        """What a recipe's section ``backbone`` says of it; what it leaves out is the paper's."""
        return cls(**{field.name: section[field.name] for field in fields(cls) if field.name in section})


PAPER = Aggregation()
