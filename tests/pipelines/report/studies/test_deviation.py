import pandas as pd
import pytest

from pipelines.report.studies.deviation import deviation_table


def test_deviations_and_what_a_single_seed_shows(results: pd.DataFrame) -> None:
    table = deviation_table(results)
    values = results.query("task == 'mnist' and method == 'linear'")["test_accuracy"]
    assert table.data.loc[0, "mnist"] == pytest.approx(values.std(ddof=1))
    single = deviation_table(results.query("seed == 0"))
    assert set(single.display.iloc[:, 1]) == {"1 seed"}
    assert set(single.display.iloc[:, -1]) == {"–"}
