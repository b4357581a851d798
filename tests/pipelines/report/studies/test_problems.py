import numpy as np
import pandas as pd

from pipelines.report.studies.problems import problem_table, section
from tests.pipelines.report.conftest import bad_row, frames_of


def test_failures_and_images_left_out_are_counted(results: pd.DataFrame) -> None:
    failed = results.copy()
    failed.loc[failed["seed"] == 2, ["status", "test_accuracy"]] = ["failed", np.nan]
    shown = section(frames_of(failed, bad_rows=bad_row()))
    assert shown is not None
    assert shown.words == "Images left out: 1. Trainings that failed: 20."
    assert shown.on_top == "warning"
    assert [table.name for table in shown.tables] == ["bad_rows", "failed_results"]
    assert section(frames_of(results)) is None


def test_long_lists_are_cut_on_display_alone() -> None:
    table = problem_table("bad_rows", "Images left out", pd.DataFrame({"index": range(70)}))
    assert (len(table.display), len(table.data)) == (50, 70)
    assert table.note == "70 in all, the first 50 shown."
