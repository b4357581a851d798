"""Runs beside one another."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from h2t.errors import UserError
from pipelines.report import report
from pipelines.report.compare import compare, leaderboard
from pipelines.run_directory import RunDirectory
from tests.pipelines.report.conftest import frames_of, result_frame, write_run
from tests.pipelines.report.studies.test_significance import RIGHT, predictions

TASKS = ("mnist", "solar_cells")


def written(path: Path, rows: pd.DataFrame, name: str = "made up") -> RunDirectory:
    results = result_frame(tasks=TASKS, methods=tuple(RIGHT))
    record: dict[str, Any] = {"layout": 2, "fingerprint": "0123abcd", "config": {"name": name}}
    return write_run(str(path), frames_of(results, predictions=rows), record)


def worse(rows: pd.DataFrame) -> pd.DataFrame:
    """Linear gets the first fifth of the images wrong."""
    victims = (rows["method"] == "linear") & (rows["index"] < 80)
    return rows.assign(prediction=rows["prediction"].mask(victims, 1))


def test_differences_and_whether_they_exceed_chance(tmp_path: Path) -> None:
    runs = [written(tmp_path / "first", predictions()), written(tmp_path / "second", worse(predictions()))]
    data = compare(runs).data
    assert set(data["reference"]) == {"efficientnet_lite0 (first)"}
    linear, others = data[data["method"] == "linear"], data[data["method"] != "linear"]
    assert (linear["high"] < -0.1).all()
    assert (others["difference"] == 0).all()
    assert set(compare(runs).display["Exceeds chance"]) == {"yes", "no"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[rows["index"] < 300],
            r"mnist: .* on 400 images and .* on 300, which are not",
        ),
        (
            lambda rows: rows.assign(label=rows["index"] % 2),
            "mnist: 200 of 400 test images have other labels",
        ),
        (lambda rows: rows[:0], "expected predictions of two runs or backbones and more, got"),
    ],
)
def test_what_is_not_comparable_is_refused_with_the_reason(tmp_path: Path, change: Any, message: str) -> None:
    runs = [written(tmp_path / "first", predictions()), written(tmp_path / "second", change(predictions()))]
    with pytest.raises(UserError, match=message):
        compare(runs)


def test_a_leaderboard_of_all_runs_below_a_folder(tmp_path: Path) -> None:
    for name in ("a", "deeper/b"):
        written(tmp_path / name, predictions(), name=f"recipe-{name[-1]}")
    data = leaderboard(str(tmp_path)).data
    assert set(data["run"]) == {"a", "deeper/b"}
    assert set(data["recipe"]) == {"recipe-a", "recipe-b"}
    assert data["mean_accuracy"].is_monotonic_decreasing
    assert len(data) == 2 * len(RIGHT)
    with pytest.raises(UserError, match="no run with results under"):
        leaderboard(str(tmp_path / "nowhere"))


def test_a_summary_for_programs_stands_beside_the_page(tmp_path: Path) -> None:
    run = written(tmp_path / "run", predictions())
    report([run], run.subdirectory("report"), Console(quiet=True))
    found = json.loads(run.read("report/summary.json"))
    assert found["test_accuracy"]["efficientnet_lite0"]["linear"]["mnist"]["n_seeds"] == 3
    assert found["sections"]["significance"]["words"].startswith("Head2Toe differs")
