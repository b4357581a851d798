"""``h2t tasks --check``: what is there of VTAB-1k."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from h2t.errors import UserError
from h2t.images import check_vtab as readiness
from h2t.images.check_vtab import check_root
from h2t.tasks import VTAB_1K, find_task


@pytest.fixture
def archive(tmp_path: Path, encode):
    """Writes a task's folder with so many images; returns the root."""

    def write(folder, n_train, n_test, label="1"):
        base = tmp_path / "vtab-1k" / folder
        for split, n_images in (("train800val200", n_train), ("test", n_test)):
            images = base / "images" / split
            images.mkdir(parents=True)
            names = [f"{number:06d}.png" for number in range(n_images)]
            for name in names:
                (images / name).write_bytes(encode(np.zeros((2, 2, 3), dtype=np.uint8)))
            lines = [f"images/{split}/{name} {label}\n" for name in names]
            (base / f"{split}.txt").write_text("".join(lines))
        return str(tmp_path / "vtab-1k")

    return write


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 19 tasks with three training and two test images each."""
    small = tuple(replace(task, n_train=3, n_test=2) for task in VTAB_1K)
    monkeypatch.setattr(readiness, "VTAB_1K", small)


def test_each_task_is_ready_incomplete_or_missing(archive, tmp_path: Path) -> None:
    archive("cifar", 3, 2)
    archive("dtd", 3, 1)
    archive("svhn", 3, 2, label="10")
    archive("dmlab", 3, 0)
    root = archive("kitti", 3, 2)
    (tmp_path / "vtab-1k" / "kitti" / "test.txt").unlink()
    (tmp_path / "vtab-1k" / "cifar" / "test.txt").touch()
    found = {state.task: state for state in check_root(root, "vtab1k")}
    assert list(found) == [task.name for task in VTAB_1K]
    assert (found["cifar100"].status, found["cifar100"].found, found["cifar100"].advice) == (
        "ready",
        "3 + 2",
        "",
    )
    how = "; add dtd/ from a copy of the VTAB-1k archive, or write Parquet: h2t prepare"
    assert (found["dtd"].status, found["dtd"].advice) == ("incomplete", "test has 1 of 2 images" + how)
    assert found["svhn"].status == "incomplete"
    assert "3 bad rows in train" in found["svhn"].advice
    assert "label 10 is out of range: expected 0 to 9" in found["svhn"].advice
    assert found["dmlab"].advice.startswith("test has 0 of 2 images; add dmlab/")
    assert (found["kitti"].status, found["kitti"].found) == ("incomplete", "3 + 0")
    assert "expected test.txt" in found["kitti"].advice
    assert found["oxford_iiit_pet"].status == "missing"
    assert "add oxford_iiit_pet/ from a copy of the VTAB-1k archive" in found["oxford_iiit_pet"].advice
    assert found["oxford_iiit_pet"].expected == "3 + 2"


def test_whole_training_sets_get_advice(tmp_path: Path, encode) -> None:
    for split, n_images in (("train", 5), ("test", 2)):
        images = tmp_path / "dmlab" / split / "0"
        images.mkdir(parents=True)
        for number in range(n_images):
            (images / f"{number}.png").write_bytes(encode(np.zeros((2, 2, 3), dtype=np.uint8)))
    state = next(state for state in check_root(str(tmp_path), "folder") if state.task == "dmlab")
    assert state.advice == "whole training set: use the options shuffle: 0 and n_train: 3"


def test_wrong_roots(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        check_root(str(tmp_path / "nowhere"), "vtab1k")
    (tmp_path / "list.txt").touch()
    for format in ("vtab1k", "parquet", "webdataset", "folder"):
        with pytest.raises(UserError, match=r"list\.txt is a file, expected the folder that holds the tasks"):
            check_root(str(tmp_path / "list.txt"), format)
    with pytest.raises(UserError, match="unknown image format 'bundled'"):
        check_root(str(tmp_path), "bundled")


def test_real_sizes_are_expected_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    states = {state.task: state.expected for state in check_root(str(tmp_path), "parquet")}
    assert states["kitti"] == f"1000 + {find_task('kitti').n_test}" == "1000 + 711"
