"""Explained predictions: rows that add up, a section of the report, a line where images are gone."""

import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from pipelines.artifacts import explanations
from pipelines.explanations import explain_run, in_turn
from pipelines.report import report
from pipelines.report.frames import read_run
from pipelines.run_directory import RunDirectory
from pipelines.task_data import open_task
from tests.pipelines.conftest import output, small_config, write_task

COUNT = 3


@pytest.fixture
def run(finished: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of the run, to be written to."""
    shutil.copytree(finished.uri, tmp_path / "run", ignore=shutil.ignore_patterns("features", "report"))
    return RunDirectory(str(tmp_path / "run"))


def files(run: RunDirectory) -> list[Path]:
    return sorted(Path(run.uri, "explanations").rglob("*.parquet"))


def test_rows_of_a_run_add_up_and_stand_in_its_report(run: RunDirectory, console: Console) -> None:
    assert read_run(run).explanations.empty
    explain_run(run, COUNT, console)
    assert "without" not in output(console)
    frames = read_run(run)
    rows = frames.explanations
    assert rows.groupby("task").size().to_dict() == {"first": COUNT, "second": COUNT}
    predicted = frames.predictions[lambda p: (p["method"] == "head2toe") & (p["seed"] == 0)]
    known = predicted.set_index(["task", "index"])
    for row in rows.to_dict("records"):
        assert row["bias"] + sum(row["parts"]) == pytest.approx(row["logit"], abs=1e-4)
        assert len(row["taps"]) == len(row["parts"]) > 1
        assert row["prediction"] == str(known.loc[(row["task"], row["index"]), "prediction"])
        assert row["label"] == str(known.loc[(row["task"], row["index"]), "label"])
        for picture in (row["image"], row["heat"]):
            with Image.open(io.BytesIO(picture)) as opened:
                assert opened.size == (32, 32)
    before = {file: file.stat().st_mtime_ns for file in files(run)}
    explain_run(run, COUNT, console)
    assert {file: file.stat().st_mtime_ns for file in files(run)} == before
    report([run], run.subdirectory("report"), console)
    page = run.read("report/index.html").decode()
    assert f"Shown are {2 * COUNT} test images" in page
    explain_run(run, 1, console)
    assert len(read_run(run).explanations) == 2
    assert len(list(Path(run.uri, "superseded", "explanations").rglob("*.parquet"))) == 2


def test_a_task_whose_images_are_gone_is_told_in_a_line(run: RunDirectory, console: Console) -> None:
    record = run.read("run.yaml").decode()
    gone = record.replace(str(Path(record.partition("root: ")[2].split()[0])), "/nowhere", 1)
    assert gone != record
    run.write("run.yaml", gone.encode())
    explain_run(run, 1, console)
    assert [line for line in output(console).splitlines() if "without first" in line]
    assert set(read_run(run).explanations["task"]) == {"second"}


def test_explanations_of_other_heads_are_not_current(tmp_path: Path) -> None:
    write_task(tmp_path, "first")
    task, run = open_task(small_config(tmp_path, tasks=["first"]), "first"), RunDirectory(str(tmp_path))
    (name,) = explanations(task, "a key", 4).units
    assert explanations(task, "a key").is_current(run, name, name)
    assert not explanations(task, "another").is_current(run, name, name)
    assert not explanations(task, "a key").units


def test_wrong_and_right_predictions_take_turns() -> None:
    right = np.array([1, 1, 0, 1, 0], bool)
    rows = pd.DataFrame({"index": np.arange(5), "label": 1, "prediction": right.astype(int)})
    assert in_turn(rows.sample(frac=1, random_state=0))["index"].tolist() == [2, 0, 4, 1, 3]
