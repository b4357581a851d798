"""Head2Toe on the first taps of a network alone: what may end a forward pass early costs in accuracy."""

from h2t.costs import tap_depths
from pipelines.backbone import load_whole
from pipelines.scope import Scope
from pipelines.variants import Facts, Study, Variant

BUDGETS = (0.25, 0.5, 0.75)
"""Shares of the operations of a whole forward pass."""


def variants(facts: Facts) -> list[Variant]:
    """All taps of the recipe, and those that a quarter, a half and three quarters of a forward pass reach."""
    points = tuple(facts.points("head2toe", facts.target_size))
    layout = facts.layouts[facts.target_size]
    depths = tap_depths(load_whole(facts.config.backbone))
    widths = dict(zip(layout.taps, layout.widths, strict=True))
    deepest = max(depths[tap] for tap in layout.taps)
    found = [Variant("all taps", points, series="budget", x=deepest)]
    for budget in BUDGETS:
        within = tuple(tap for tap in layout.taps if depths[tap] <= budget)
        usable = tuple(p for p in points if int(sum(widths[tap] for tap in within) * p.keep_fraction))
        if usable and len(within) < len(layout.taps):
            share = max(depths[tap] for tap in within)
            name = f"at most {budget:.0%} of a pass"
            scope = Scope(taps=within)
            found.append(Variant(name, usable, scope, series="budget", x=share, reference="all taps"))
    return sorted(found, key=lambda variant: variant.x)


STUDY = Study(variants)
