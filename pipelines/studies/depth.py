"""Head2Toe on the first taps of a network alone: what may end a forward pass early costs in accuracy."""

from h2t.costs import flops_up_to
from pipelines.backbone import load
from pipelines.scope import Scope
from pipelines.variants import Facts, Study, Variant

BUDGETS = (0.25, 0.5, 0.75)
"""Shares of the operations of a whole forward pass."""


def variants(facts: Facts) -> list[Variant]:
    """All taps, and those that a quarter, a half and three quarters of a forward pass reach."""
    points = tuple(facts.points("head2toe", facts.target_size))
    taps = facts.layouts[facts.target_size].taps
    costs = flops_up_to(load(facts.config.backbone, weights="random"))
    whole = max(costs.values())
    found = [Variant("all taps", points, series="budget", x=1.0)]
    for budget in BUDGETS:
        within = tuple(tap for tap in taps if costs[tap] <= budget * whole)
        layout = facts.layouts[facts.target_size]
        width = sum(w for tap, w in zip(layout.taps, layout.widths, strict=True) if tap in within)
        usable = tuple(point for point in points if int(width * point.keep_fraction))
        if within and usable:
            share = max(costs[tap] for tap in within) / whole
            scope = Scope(taps=within)
            name = f"at most {budget:.0%} of a pass"
            found.append(Variant(name, usable, scope, series="budget", x=share, reference="all taps"))
    return sorted(found, key=lambda variant: variant.x)


STUDY = Study(variants)
