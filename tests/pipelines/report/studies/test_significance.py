import numpy as np
import pandas as pd
import pytest

from pipelines.report.frames import SCHEMAS, Frames
from pipelines.report.paired import correctness, intervals, not_worse_than_best
from pipelines.report.studies import accuracy, quality, significance
from tests.pipelines.report.conftest import frames_of, result_frame

RIGHT = {"linear": 0.6, "all_l2": 0.796, "head2toe": 0.8}


def predictions(tasks: tuple[str, ...] = ("mnist", "solar_cells"), n_images: int = 400) -> pd.DataFrame:
    """Predictions of methods that get a share of the images right, the same ones first."""
    generator, rows = np.random.default_rng(0), []
    for task in tasks:
        for method, share in RIGHT.items():
            for seed in range(3):
                right = np.arange(n_images) < n_images * share
                flipped = generator.random(n_images) < 0.02
                labels = np.zeros(n_images, int)
                found = {"label": labels, "prediction": (right == flipped).astype(int)}
                keys = {"backbone": "efficientnet_lite0", "task": task, "method": method, "seed": seed}
                rows.append(pd.DataFrame({**found, "index": np.arange(n_images)}).assign(**keys))
    return pd.concat(rows, ignore_index=True).reindex(columns=SCHEMAS["predictions"].names)


@pytest.fixture
def frames() -> Frames:
    results = result_frame(tasks=("mnist", "solar_cells"), methods=tuple(RIGHT))
    return frames_of(results, predictions=predictions())


def test_a_clear_difference_and_one_by_chance(frames: Frames) -> None:
    rows = significance.differences(frames.correctness, frames.finished)
    assert set(rows["reference"]) == {"head2toe"}
    by_method = rows.set_index(["task", "method"])
    assert by_method.loc[("mnist", "linear"), "low"] > 0.1
    assert by_method.loc[("mnist", "linear"), "p_mcnemar"] < 1e-6
    assert by_method.loc[("mnist", "all_l2"), "low"] < 0 < by_method.loc[("mnist", "all_l2"), "high"]
    section = significance.section(frames)
    assert section is not None
    assert "by more than chance in 2 of 4 comparisons, and is better in 2" in section.words


def test_table1_marks_what_the_best_does_not_clearly_beat(frames: Frames) -> None:
    table = accuracy.accuracy_table(frames.finished, frames.correctness)
    shown = table.display.set_index(("", "Method"))
    marked = {method: [accuracy.CLOSE in cell for cell in cells] for method, cells in shown.T.items()}
    assert marked["+All-l2"][:2] == [True, True]
    assert not any(marked["Linear"] + marked["Head2Toe"])
    plain = accuracy.accuracy_table(frames.finished)
    assert plain.bold == table.bold
    assert accuracy.CLOSE not in plain.note


def test_methods_that_saw_other_images_are_not_compared(frames: Frames) -> None:
    rows = frames.predictions
    fewer = rows[~((rows["method"] == "head2toe") & (rows["index"] == 7))]
    found = correctness(fewer)
    assert "head2toe" not in found["efficientnet_lite0", "mnist"]
    assert set(found["efficientnet_lite0", "mnist"]) == {"linear", "all_l2"}
    assert significance.differences(found, frames.finished).empty


def test_trainings_that_diverged_do_not_count(frames: Frames) -> None:
    rows = frames.predictions.copy()
    rows.loc[(rows["method"] == "linear") & (rows["seed"] == 1), "prediction"] = -1
    assert len(correctness(rows)["efficientnet_lite0", "mnist"]["linear"]) == 2


def test_intervals_stand_beside_the_measures(frames: Frames) -> None:
    data = quality.measures(frames)
    expected = intervals(frames.correctness)["efficientnet_lite0", "linear", "mnist"]
    row = data[(data["method"] == "linear") & (data["task"] == "mnist")].iloc[0]
    assert (row["low"], row["high"]) == (expected.low, expected.high)
    without = quality.measures(frames_of(frames.results))
    assert without["low"].isna().all()


def test_over_tasks(frames: Frames) -> None:
    rows = significance.over_tasks(frames.finished).set_index("method")
    assert rows.loc["head2toe", "average_rank"] == 1
    assert rows.loc["linear", "difference"] > 0
    assert np.isnan(rows.loc["head2toe", "p_wilcoxon"])
    assert not_worse_than_best({}, {}) == set()


def test_nothing_to_compare() -> None:
    assert significance.section(Frames(results=result_frame(methods=("linear",)))) is None
