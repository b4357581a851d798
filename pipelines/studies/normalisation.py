"""Section 3.3: unit norm per example and tap "works better than normalizing each feature or not at all"."""

from pipelines.variants import Facts, Study, Variant

METHODS = ("head2toe", "head2toe_per_feature", "head2toe_unnormalised")


def variants(facts: Facts) -> list[Variant]:
    """Head2Toe with each of the three normalisations."""
    return [
        Variant(
            name, tuple(facts.points(name)), series=name, x=position, reference=METHODS[0] if position else ""
        )
        for position, name in enumerate(METHODS)
    ]


STUDY = Study(variants)
