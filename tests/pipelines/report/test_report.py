"""Reports of run directories."""

import ast
import io
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

import pipelines.report
from h2t.errors import UserError
from pipelines.report import report, studies
from pipelines.report.frames import Frames
from pipelines.run_directory import RunDirectory
from tests.pipelines.report.conftest import (
    chosen_frame,
    frames_of,
    kept_frame,
    published_results,
    result_frame,
    write_run,
)


def silent() -> Console:
    return Console(file=io.StringIO(), width=120)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_importing_the_report_leaves_ray_out() -> None:
    code = "import pipelines.report, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_of_the_pipelines_the_report_imports_only_what_describes_a_run_directory() -> None:
    modules = set()
    for path in Path(str(pipelines.report.__file__)).parent.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        modules |= {str(node.module) for node in nodes}
    others = [name for name in modules if name.startswith("pipelines") and "pipelines.report" not in name]
    assert sorted(others) == ["pipelines.run_directory", "pipelines.run_record", "pipelines.schemas"]


def test_the_report_lies_where_it_is_told_to_and_changes_nothing_else(
    tmp_path: Path, results: pd.DataFrame
) -> None:
    run = write_run(str(tmp_path / "run"), frames_of(results), {"layout": 2, "packages": {"torch": "1.2.3"}})
    before, console = contents(tmp_path / "run"), silent()
    names = report([run], RunDirectory(str(tmp_path / "page")), console)
    assert contents(tmp_path / "run") == before
    assert set(names) == set(contents(tmp_path / "page"))
    assert "torch: 1.2.3" in (tmp_path / "page" / "index.html").read_text()
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "Solar cells" in shown
    assert f"report    {len(names)} files; open {tmp_path}/page/index.html" in shown.replace("\n", "")


def test_only_files_of_an_earlier_report_are_replaced(tmp_path: Path) -> None:
    wide = write_run(str(tmp_path / "wide"), frames_of(result_frame(methods=["linear", "scratch"])))
    narrow = write_run(str(tmp_path / "narrow"), frames_of(result_frame(methods=["linear"])))
    destination = RunDirectory(str(tmp_path / "page"))
    assert "affinity.csv" in report([wide], destination, silent())
    destination.write("notes.csv", b"the user's")
    names = report([narrow], destination, silent())
    assert set(contents(tmp_path / "page")) == {*names, "notes.csv"}
    assert "affinity.csv" not in names


def test_runs_without_results_are_refused(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    with pytest.raises(UserError, match=f"no results in {tmp_path}: run the evaluate stage first"):
        report([run], run, silent())
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "methods", [["linear"], ["head2toe"], ["scratch", "finetune"], ["linear", "scratch"]]
)
def test_what_is_missing_is_left_out(tmp_path: Path, methods: list[str]) -> None:
    run = write_run(str(tmp_path), Frames(results=result_frame(methods=methods, seeds=(0,))))
    names = report([run], RunDirectory(f"{tmp_path}/report"), silent())
    assert {"table1.md", "costs.md"} <= set(names)
    assert not {"gain.svg", "table2.md", "kept_features.md"} & set(names)
    assert ("affinity.md" in names) == (methods == ["linear", "scratch"])


def test_two_runs_of_a_backbone_stand_side_by_side(tmp_path: Path) -> None:
    rows = published_results("resnet50")
    runs = [
        write_run(str(tmp_path / "first"), frames_of(rows)),
        write_run(str(tmp_path / "second"), frames_of(rows)),
    ]
    destination = RunDirectory(str(tmp_path / "page"))
    names = report(runs, destination, silent())
    assert {"gain-resnet50-first.svg", "gain-resnet50-second.png", "affinity-resnet50-first.svg"} <= set(
        names
    )
    table = destination.read_frame(["table1.parquet"])
    assert table["backbone"].value_counts().to_dict() == dict.fromkeys(
        ["resnet50 (first)", "resnet50 (second)"], rows["method"].nunique()
    )
    assert set(destination.read_frame(["paper.parquet"])["backbone"]) == set(table["backbone"])


def test_a_new_study_is_a_new_module(
    tmp_path: Path, results: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up.py").write_text(
        "from pipelines.report.studies import Section\n"
        "def section(frames):\n"
        "    return Section('made_up', 'A new study', 15, f'It saw {len(frames.results)} results.')\n"
    )
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(tmp_path)])
    run = write_run(str(tmp_path / "run"), frames_of(results))
    report([run], run, silent())
    page = run.read("index.html").decode()
    positions = [page.index(f'<section id="{name}"') for name in ("table1", "made_up", "gain")]
    assert positions == sorted(positions)
    assert '<a href="#made_up">A new study</a>' in page
    assert f"It saw {len(results)} results." in page
    sys.modules.pop("pipelines.report.studies.made_up")


def test_rows_in_another_order_give_the_same_bytes(tmp_path: Path) -> None:
    results = pd.concat([published_results("resnet50"), result_frame("vitb16", methods=["linear"])])
    shuffled = results.sample(frac=1.0, random_state=3)
    others = {"kept": kept_frame(results, n_taps=6), "chosen": chosen_frame(results)}
    for name, rows in (("a/run", results), ("b/run", shuffled)):
        run = write_run(str(tmp_path / name), frames_of(rows, **others))
        report([run], RunDirectory(f"{run.uri}/report"), silent())
    first, second = (contents(tmp_path / name / "run" / "report") for name in "ab")
    assert [name for name in first if first[name] != second.get(name)] == []
