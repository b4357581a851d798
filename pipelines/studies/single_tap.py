"""Figures 4, 8 (right) and 9: the embedding and one more tap, each in turn."""

from pipelines.scope import Scope
from pipelines.variants import Facts, Study, Variant

ALONE = "embedding alone"


def variants(facts: Facts) -> list[Variant]:
    """The embedding alone, and with every other tap at the target size nearest to its width (Section 3.2)."""
    size = facts.target_size
    layout = facts.layouts[size]
    points = tuple(facts.points("all", size))
    pairs = [
        Variant(tap, points, Scope(taps=_in_order(layout.taps, tap, facts.embedding)), "", index, ALONE)
        for index, (tap, width) in enumerate(zip(layout.taps, layout.widths, strict=True))
        if tap != facts.embedding and width
    ]
    return [Variant(ALONE, tuple(facts.points("linear")), x=-1), *pairs]


def _in_order(taps: tuple[str, ...], *some: str) -> tuple[str, ...]:
    return tuple(tap for tap in taps if tap in some)


STUDY = Study(variants)
