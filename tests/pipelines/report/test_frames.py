"""Run directories as they are read."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from h2t.errors import UserError
from pipelines import schemas
from pipelines.report.frames import SCHEMAS, Frames, model_name, read_run, read_runs
from pipelines.run_directory import RunDirectory
from tests.pipelines.report.conftest import COSTS, bad_row, frames_of, result_frame, write_run

RECORD: dict[str, Any] = {
    "layout": 2,
    "fingerprint": "fedcba987654",
    "packages": {"torch": "1.2.3", "head2toe-ray": "0.0.1"},
    "config": {"name": "mine", "methods": ["linear"], "grid": {"steps": [5]}, "finetune": {"steps": [7]}},
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_columns_are_those_that_the_stages_write(kind: str) -> None:
    assert SCHEMAS[kind] is getattr(schemas, kind.upper())


FILE = "results/any-0123456789ab.parquet"


def test_frames_come_back_from_a_run_directory(tmp_path: Path, results: pd.DataFrame) -> None:
    written = frames_of(results, bad_rows=bad_row())
    frames = read_run(write_run(str(tmp_path), written))
    for kind in SCHEMAS:
        expected, actual = getattr(written, kind), getattr(frames, kind)
        order = [name for name in ("task", "method", "seed", "tap_index") if name in actual]
        pd.testing.assert_frame_equal(
            actual.sort_values(order, ignore_index=True),
            expected[list(actual)].sort_values(order, ignore_index=True),
            check_dtype=False,
        )
    assert frames.costs == COSTS


def test_keys_may_be_dictionary_encoded(tmp_path: Path, results: pd.DataFrame) -> None:
    run = RunDirectory(str(tmp_path))
    table = pa.Table.from_pandas(results, preserve_index=False)
    column = table["task"].cast(pa.string()).dictionary_encode()
    run.write_table(FILE, table.set_column(table.column_names.index("task"), "task", column))
    assert list(read_run(run).results["task"]) == list(results["task"])


def test_what_is_absent_is_empty_and_missing_columns_are_null(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    run.write_table(FILE, pa.table({"task": ["mnist"], "status": ["failed"], "extra": [1]}))
    run.write("results/.tmp-1234-b.parquet", b"of a writer that was killed")
    frames = read_run(run)
    assert len(frames.results) == 1
    assert frames.results["test_accuracy"].isna().all()
    for kind in ("trials", "chosen", "kept", "bad_rows"):
        assert getattr(frames, kind).empty
        assert list(getattr(frames, kind)) == SCHEMAS[kind].names
    assert frames.provenance == {"recipe": "not known: run.yaml is missing"}


def test_provenance_is_that_of_the_files(tmp_path: Path, results: pd.DataFrame) -> None:
    frames = frames_of(results)
    run = write_run(str(tmp_path), frames, RECORD)
    run.write("history/run-0011.yaml", b"layout: 2")
    stated = read_run(run).provenance
    assert stated["recipe"] == "mine"
    assert stated["backbone"]["loaded"] == "model.pth"
    assert stated["images"]["mnist"]["encoding"] == "PNG"
    assert stated["packages"] == RECORD["packages"]
    assert stated["packages of the features"] == [{"torch": "1.2.3"}]
    assert stated["earlier configurations"].startswith("1,")
    assert "fine-tuning" not in stated
    trained = {**RECORD, "config": {**RECORD["config"], "methods": ["finetune"]}}
    assert read_run(write_run(str(tmp_path), frames, trained)).provenance["fine-tuning"] == {"steps": [7]}


def test_backbones_of_several_runs_are_never_mixed_up(tmp_path: Path) -> None:
    first = write_run(str(tmp_path / "a"), frames_of(result_frame(seeds=(0,))))
    both = pd.concat([result_frame(seeds=(1,)), result_frame("resnet50", seeds=(1,))])
    second = write_run(str(tmp_path / "b"), frames_of(both), RECORD)
    frames = read_runs([first, second])
    assert frames.backbones == ["efficientnet_lite0 (a)", "efficientnet_lite0 (b)", "resnet50"]
    for kind in ("results", "chosen", "kept"):
        assert sorted(getattr(frames, kind)["backbone"].unique()) == frames.backbones
    assert set(frames.results.loc[frames.results["backbone"] == frames.backbones[0], "seed"]) == {0}
    assert set(frames.costs) == set(frames.backbones[:2])
    assert frames.provenance["b: recipe"] == "mine"
    assert [model_name(backbone) for backbone in frames.backbones][1:] == ["efficientnet_lite0", "resnet50"]


def test_runs_in_folders_of_one_name_have_their_paths_behind(tmp_path: Path, results: pd.DataFrame) -> None:
    runs = [write_run(str(tmp_path / parent / "run"), Frames(results=results)) for parent in "ab"]
    expected = [f"efficientnet_lite0 ({tmp_path}/{parent}/run)" for parent in "ab"]
    assert read_runs(runs).backbones == expected
    assert read_runs([runs[0], runs[0]]).backbones == ["efficientnet_lite0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", b"", "layout 1, expected 2"),
        ("run.yaml", b"layout: 3", "layout 3, expected 2"),
        (FILE, b"PAR1", r"can't read results of .*any-0123456789ab\.parquet"),
    ],
)
def test_other_layouts_and_damaged_files_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    run = RunDirectory(str(tmp_path))
    run.write(name, content)
    with pytest.raises(UserError, match=message):
        read_run(run)
