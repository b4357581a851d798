"""Figure 11, right: as many features as always, but behind those of the highest relevance scores."""

from dataclasses import replace

from pipelines.variants import Facts, Study, Variant

N_KEPT = 2048
"""The paper's; where there are fewer than eight times as many features, an eighth of them."""


def variants(facts: Facts) -> list[Variant]:
    """Windows of ranks that start at 0, n, 2 n, 4 n, … and at the end, with what was chosen for Head2Toe."""
    point = facts.chosen[facts.task.name]["head2toe"]
    n_features = facts.layouts[point.target_size].n_features
    n_kept = max(1, min(N_KEPT, n_features // 8))
    last = n_features - n_kept
    offsets = [
        0,
        *(n_kept << power for power in range(n_features.bit_length()) if n_kept << power < last),
        last,
    ]
    point = replace(point, keep_fraction=(n_kept + 0.5) / n_features)
    return [
        Variant(
            f"offset {offset}",
            (replace(point, offset=offset),),
            x=offset,
            reference="offset 0" if offset else "",
        )
        for offset in offsets
    ]


STUDY = Study(variants, needs=("head2toe",))
