import pandas as pd
import pytest

from pipelines.report.studies.kept_features import kept_table, section
from tests.pipelines.report.conftest import frames_of, kept_frame


def test_counts_are_means_over_seeds_and_shares_add_up(results: pd.DataFrame) -> None:
    kept = kept_frame(results)
    kept.loc[kept["seed"] == 0, "n_kept"] += 3
    data = kept_table(kept).data
    assert data.groupby("task")["share"].sum().to_numpy() == pytest.approx(1.0)
    last = kept.query("task == 'mnist' and tap_index == 50")["n_kept"]
    assert data.query("task == 'mnist' and tap_index == 50")["n_kept"].item() == pytest.approx(last.mean())


def test_only_methods_that_keep_some_features_are_shown(results: pd.DataFrame) -> None:
    kept = kept_frame(results)
    others = [kept.assign(method=method) for method in ("all_l1", "head2toe_ft")]
    shown = section(frames_of(results, kept=pd.concat([kept, *others])))
    assert shown is not None
    assert [figure.name for figure in shown.figures] == ["kept_features", "kept_features-head2toe_ft"]
    assert set(shown.tables[0].data["method"]) == {"head2toe", "head2toe_ft"}
    assert section(frames_of(results, kept=others[0])) is None


def test_nothing_kept_is_not_drawn(results: pd.DataFrame) -> None:
    shown = section(frames_of(results, kept=kept_frame(results).assign(n_kept=0)))
    assert shown is not None
    assert shown.figures == ()
    assert shown.tables[0].data["share"].isna().all()
