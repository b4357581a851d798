"""The command line as a user meets it: real processes, their output and exit status."""

import subprocess
import sys
from pathlib import Path

import pytest


def h2t(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no-such-recipe"], "unknown recipe 'no-such-recipe'"),
        (["run", "dem"], "did you mean demo?"),
        (["run", "none.yaml"], "no recipe at 'none.yaml'"),
        (["run", "demo", "--set", "grid.keep_fraction=[0]"], "grid.keep_fraction.0: input should be greater"),
        (["extract", "demo", "--set", "grid.stesp=[1]"], "did you mean steps?"),
        (["sweep", "demo", "--set", "tasks=[mnits]"], "did you mean mnist?"),
        (["report", "demo", "--set", "cross_validation.n_folds=1"], "cross_validation.n_folds"),
        (["taps", "resnet5o"], "did you mean resnet50"),
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


def test_tasks_and_taps_are_listed() -> None:
    listed = h2t("tasks").stdout
    assert all(name in listed for name in ("mnist", "solar_cells", "dsprites_ori", "sun397", "kitti"))
    taps = h2t("taps", "efficientnet_lite0", "--image-size", "128", "--target-size", "512").stdout
    assert "28,296" in taps
    assert "51 taps" in taps
