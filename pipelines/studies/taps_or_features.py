"""Figures 6 (left) and 10: features kept one by one, or tap by tap, equally many of them."""

from pipelines.variants import Facts, Study, Variant

METHODS = ("head2toe", "head2toe_layerwise", "head2toe_layergroup")


def variants(facts: Facts) -> list[Variant]:
    """Every method with every fraction of the grid, at the target size nearest to the embedding's width."""
    size = facts.target_size
    n_features = facts.layouts[size].n_features
    return [
        Variant(
            f"{method} {fraction:g}",
            tuple(p for p in facts.points(method, size) if p.keep_fraction == fraction),
            series=method,
            x=int(n_features * fraction),
            reference="" if method == METHODS[0] else f"{METHODS[0]} {fraction:g}",
        )
        for method in METHODS
        for fraction in sorted(facts.config.grid.keep_fraction)
    ]


STUDY = Study(variants)
