import numpy as np
import pandas as pd
import pytest

from pipelines.report.studies import overlap
from tests.pipelines.report.conftest import frames_of, result_frame


def kept(sets: dict[tuple[str, int], list[int]], n_features: int = 20) -> pd.DataFrame:
    """Kept features of Head2Toe on two taps of 10, by task and seed."""
    rows = []
    for (task, seed), indices in sets.items():
        for tap in (0, 1):
            inside = [index - 10 * tap for index in indices if index // 10 == tap]
            keys = {
                "backbone": "resnet50",
                "task": task,
                "group": "natural",
                "method": "head2toe",
                "seed": seed,
            }
            tap_of = {"tap": f"tap{tap}", "tap_index": tap, "n_features": n_features // 2}
            rows.append({**keys, **tap_of, "method": "head2toe", "n_kept": len(inside), "kept": inside})
    return pd.DataFrame(rows)


def test_shares_between_seeds_and_tasks() -> None:
    sets = {("mnist", 0): [1, 2, 3, 14], ("mnist", 1): [1, 2, 4, 15], ("dtd", 0): [2, 12]}
    data = overlap.overlaps(kept(sets)).set_index(["task", "other"])
    assert data.loc[("mnist", "mnist"), "shared"] == 0.5  # of both orders, another seed each
    assert data.loc[("mnist", "dtd"), "shared"] == 0.25
    assert data.loc[("dtd", "mnist"), "shared"] == 0.5
    assert data.loc[("dtd", "mnist"), "chance"] == pytest.approx(4 / 20)
    assert ("dtd", "dtd") not in data.index  # a single seed


def test_the_same_features_in_another_tap_are_others() -> None:
    data = overlap.overlaps(kept({("mnist", 0): [1, 2], ("dtd", 0): [11, 12]}))
    assert (data["shared"] == 0).all()


def test_tasks_of_other_target_sizes_are_not_compared() -> None:
    rows = pd.concat([kept({("mnist", 0): [1]}), kept({("dtd", 0): [1]}, n_features=40)], ignore_index=True)
    assert overlap.overlaps(rows).empty


def test_the_section_says_what_chance_would_give() -> None:
    section = overlap.section(frames_of(result_frame()))
    assert section is not None
    assert "two tasks" in section.words
    assert "chance would give" in section.words
    assert len(section.figures) == 1
    assert np.isfinite(section.tables[0].data["shared"]).all()
