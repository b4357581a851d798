"""Figure 13: fewer training images, equally many of each class."""

from pipelines.scope import Scope
from pipelines.variants import Facts, Study, Variant

METHODS = ("linear", "all_l21", "head2toe")
"""The last two share their training on all features."""
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)


def variants(facts: Facts) -> list[Variant]:
    """Every method on every fraction f of the images: int(f · n / C) of each of the C classes, at least 1."""
    return [
        Variant(
            f"{method} {fraction:g}",
            tuple(facts.points(method)),
            Scope(shots=shots(len(facts.task.labels["train"]), facts.task.n_classes, fraction)),
            series=method,
            x=fraction,
            reference="" if fraction == 1 else f"{method} 1",
        )
        for method in METHODS
        for fraction in FRACTIONS
    ]


def shots(n_images: int, n_classes: int, fraction: float) -> int | None:
    """Images of each class; None for all images as they are."""
    return None if fraction == 1 else max(1, int(n_images * fraction / n_classes))


STUDY = Study(variants)
