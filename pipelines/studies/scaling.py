"""Figures 7 (right), 14 and 16: Head2Toe on fewer candidates, by target size and part of the taps."""

from pipelines.scope import EVERYTHING, Scope
from pipelines.variants import Facts, Study, Variant

FRACTIONS = (1 / 16, 1 / 4, 1.0)


def variants(facts: Facts) -> list[Variant]:
    """Every target size of the grid with a sixteenth, a quarter and all of the taps."""
    return [
        Variant(
            f"{fraction:g} of the taps, T = {size}",
            tuple(
                p for p in facts.points("head2toe", size) if int(_width(facts, size, taps) * p.keep_fraction)
            ),
            EVERYTHING if fraction == 1 else Scope(taps=taps),
            series=f"{fraction:g}",
            x=size,
            reference="" if fraction == 1 else f"1 of the taps, T = {size}",
        )
        for size in sorted(facts.layouts)
        for fraction in FRACTIONS
        for taps in [evenly_spaced(facts.layouts[size].taps, fraction)]
    ]


def evenly_spaced(taps: tuple[str, ...], fraction: float) -> tuple[str, ...]:
    """A fraction of the taps, at equal distances, with the last one: which, the paper does not say."""
    n = max(1, round(fraction * len(taps)))
    return tuple(taps[len(taps) - 1 - number * len(taps) // n] for number in reversed(range(n)))


def _width(facts: Facts, size: int, taps: tuple[str, ...]) -> int:
    layout = facts.layouts[size]
    return sum(width for tap, width in zip(layout.taps, layout.widths, strict=True) if tap in taps)


STUDY = Study(variants)
