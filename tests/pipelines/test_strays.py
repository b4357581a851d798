"""Files in a run directory that are nobody's: no stage, report or other reader stumbles over them."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines.cluster import Cluster
from pipelines.config import Config
from pipelines.contents import describe
from pipelines.report import report
from pipelines.report.compare import compare, leaderboard
from pipelines.report.frames import read_run
from pipelines.run import STAGES, run_stages
from pipelines.run_directory import RunDirectory
from pipelines.status import status
from tests.pipelines.conftest import MEASURED, output, run_all, small_config

STRAYS = (".tmp-12345678-part.parquet", "x.tmp", "notes.txt", "foo.parquet", "half.parquet", "x.json",
          ".old/results-0123456789ab.parquet")  # fmt: skip


def scatter(run: Path, top: str) -> None:
    """Put what is nobody's into a folder and all below it: half a table, notes, tables of other columns."""
    for folder, _, _ in list(os.walk(run / top)):
        for name in STRAYS:
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            if name in ("half.parquet", "x.tmp"):
                path.write_bytes(b"PAR1half")
            elif name.endswith(".parquet"):
                pq.write_table(pa.table({"x": [1], "task": ["first"]}), path)
            else:
                path.write_text("Bring the cat in.")


@pytest.fixture
def copied(finished: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(finished.uri, tmp_path / "run")
    return RunDirectory(str(tmp_path / "run"))


FOLDERS = ("features", "trials", "chosen", "heads", "predictions", "results", "kept", "manifests", "bad_rows",
           "thumbnails", "status", "history", "tune", "superseded", "grams", "")  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_reader_passes_over_what_is_not_ours(
    copied: RunDirectory, finished: RunDirectory, folder: str
) -> None:
    root = Path(copied.uri)
    (root / folder).mkdir(exist_ok=True)
    before, leaders = read_run(copied), leaderboard(copied.uri)
    rows_before = status(copied, now=0.0)[0]
    said = {name: value for name, value in describe(copied.uri) if name.startswith("rows of")}
    scatter(root, folder)
    after = read_run(copied)
    for kind in ("results", "trials", "chosen", "kept", "predictions", "bad_rows", "thumbnails"):
        pd.testing.assert_frame_equal(getattr(after, kind), getattr(before, kind))
    assert (after.costs, after.asked) == (before.costs, before.asked)
    assert status(copied, now=0.0)[0] == rows_before
    assert leaderboard(copied.uri).data.equals(leaders.data)
    assert said == {name: value for name, value in describe(copied.uri) if name.startswith("rows of")}
    assert len(compare([copied, finished]).data) == 10


def test_a_run_with_strays_everywhere_has_nothing_to_do(
    copied: RunDirectory, finished: RunDirectory, images: Path, console: Console
) -> None:
    scatter(Path(copied.uri), "")
    run_all(small_config(images), copied, console)
    assert output(console).count("nothing to do") == 4
    pd.testing.assert_frame_equal(read_run(copied).results, read_run(finished).results)


@pytest.fixture(scope="module")
def with_all_stages(images: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory(str(tmp_path_factory.mktemp("every-stage")))
    run_all(every_stage(images), run)
    return run


def every_stage(images: Path) -> Config:
    return small_config(
        images, ("first",), seeds=[0],
        methods=["linear", "head2toe", "tap_kernels", "scratch"], studies=["relevance-offset"],
        finetune={"learning_rate": [0.1], "steps": [2], "batch_size": 8, "folds": 2},
    )  # fmt: skip


MADE = {
    "extract": ["features", "grams", "manifests"], "sweep": ["trials/test_efficientnet/first/frozen"],
    "evaluate": [f"{kind}/test_efficientnet/first/frozen" for kind in ("heads", "predictions", "results")],
    "finetune": [f"{kind}/test_efficientnet/first/finetuned" for kind in ("heads", "predictions", "results")],
    "study": ["studies"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.timeout(400)
def test_every_stage_passes_over_what_is_not_ours(
    with_all_stages: RunDirectory, images: Path, tmp_path: Path, stage: str
) -> None:
    shutil.copytree(with_all_stages.uri, tmp_path / "run")
    run = RunDirectory(str(tmp_path / "run"))
    for folder in MADE[stage]:
        shutil.rmtree(tmp_path / "run" / folder)
        (tmp_path / "run" / folder).mkdir()
    scatter(tmp_path / "run", "")
    run_stages(every_stage(images), run.uri, [stage], Console(quiet=True))
    report([run], run.subdirectory("report"), Console(quiet=True))
    before, after = read_run(with_all_stages), read_run(run)
    for kind in ("results", "study_results"):
        expected, rows = (
            getattr(frames, kind).drop(columns=MEASURED, errors="ignore") for frames in (before, after)
        )
        keys = [name for name in ("task", "method", "variant", "seed") if name in expected]
        pd.testing.assert_frame_equal(
            *(rows.sort_values(keys).reset_index(drop=True) for rows in (expected, rows))
        )
