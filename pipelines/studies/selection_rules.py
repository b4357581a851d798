"""Other rules that keep features, against the group lasso of Section 3.3."""

from h2t.methods import METHODS
from pipelines.variants import Facts, Study, Variant

REFERENCE = "head2toe"


def variants(facts: Facts) -> list[Variant]:
    """Head2Toe, and every method that keeps features by the training images alone."""
    others = [name for name, method in METHODS.items() if method.features == "kept" and not method.scored]
    return [
        Variant(
            name, tuple(facts.points(name)), series=name, x=position, reference=REFERENCE if position else ""
        )
        for position, name in enumerate((REFERENCE, *others))
    ]


STUDY = Study(variants)
