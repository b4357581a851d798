"""What the doctor finds, on this machine as it is and as it might be."""

import shutil
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from pipelines import doctor
from pipelines.doctor import GIB, Finding, examine_machine, examine_recipe
from pipelines.run_directory import RunDirectory
from tests.pipelines.conftest import invoke, small_config, write_task

Usage = namedtuple("Usage", "total used free")


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_this_machine_is_fit_to_run() -> None:
    findings = by_check(examine_machine())
    assert {f.check for f in findings.values() if f.result == "FAIL"} == set()
    assert f"torch {version('torch')}" in findings["packages"].found
    assert all(bool(f.fix) == (f.result != "PASS") for f in findings.values())


@pytest.mark.parametrize(
    ("check", "result", "words"),
    [
        ("cores", "WARN", "limits them to 0.5"),
        ("memory", "WARN", "of 1.0 GiB free"),
        ("shared memory", "WARN", "0.06 GiB free in /dev/shm"),
        ("temporary folder", "WARN", "too long for Ray's sockets"),
        ("GPU", "FAIL", "there is a GPU, but torch"),
        ("packages", "FAIL", "torch 0.1, expected"),
    ],
)
def test_what_is_wrong_is_told_with_its_remedy(
    check: str, result: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000")
    (tmp_path / "memory.max").write_text(str(GIB))
    monkeypatch.setattr("pipelines.machine.CGROUP", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**26, 0, 2**26))
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{'long' * 20}")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "torch" else real(name))
    finding = by_check(examine_machine())[check]
    assert finding.result == result
    assert words in finding.found
    assert finding.fix


def test_a_recipe_that_can_run_passes(tmp_path: Path) -> None:
    write_task(tmp_path / "images", "first")
    config = small_config(tmp_path / "images", tasks=["first"])
    findings = by_check(list(examine_recipe(config, RunDirectory(str(tmp_path / "run")))))
    assert {finding.result for finding in findings.values()} == {"PASS"}
    assert "20 train, 12 test; 2 classes" in findings["images of first"].found
    assert "GiB of features" in findings["room"].found
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_lacks_fails_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path / "images", "first")
    whole = small_config(tmp_path / "images", tasks=["first"])
    backbone = whole.backbone.model_copy(update={"weights": str(tmp_path / "none.safetensors")})
    (tmp_path / "images" / "first" / "test.parquet").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10, 0, 10))
    config = whole.model_copy(update={"backbone": backbone})
    findings = by_check(
        list(examine_recipe(config, RunDirectory(f"{tmp_path}/images/first/train.parquet/run")))
    )
    for check in ("weights", "images of first", "run directory"):
        assert findings[check].result == "FAIL", check
    assert "none.safetensors" in findings["weights"].found


def test_the_command_tells_by_its_exit_status(tmp_path: Path) -> None:
    assert invoke("doctor")[0] == 0
    write_task(tmp_path / "images", "first")
    config = small_config(tmp_path / "images", tasks=["first"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert invoke("doctor", str(recipe), "--run-dir", str(tmp_path / "run"))[0] == 0
    (tmp_path / "images" / "first" / "train.parquet").unlink()
    code, shown = invoke("doctor", str(recipe), "--run-dir", str(tmp_path / "run"))
    assert code == 1
    assert "FAIL" in shown
