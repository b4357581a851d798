"""Mirror images as further training images."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from h2t.errors import UserError
from h2t.images.preprocessing import decode
from pipelines.artifacts import features, features_key
from pipelines.feature_files import read_features
from pipelines.run_directory import RunDirectory
from pipelines.task_data import open_task
from tests.pipelines.conftest import frame, result_rows, run_all, small_config, write_task


def flipped(root: Path) -> dict[str, object]:
    images = {"format": "parquet", "root": str(root / "first"), "flips": True}
    return {"name": "first", "n_classes": 2, "group": "natural", "images": images}


def test_the_second_half_of_the_rows_are_the_images_mirrored(images: Path) -> None:
    plain = open_task(small_config(images, ("first",)), "first")
    task = open_task(small_config(images, (flipped(images),)), "first")
    assert len(task.labels["train"]) == 40
    np.testing.assert_array_equal(task.labels["train"], np.tile(plain.labels["train"], 2))
    originals = [decode(image) for image in plain.read("train", [3, 7])]
    again, mirrored, other = (decode(image) for image in task.read("train", [3, 23, 27]))
    np.testing.assert_array_equal(again, originals[0])
    np.testing.assert_array_equal(mirrored, originals[0][:, ::-1])
    np.testing.assert_array_equal(other, originals[1][:, ::-1])
    assert len(task.labels["test"]) == 12
    assert features_key(task, "train") != features_key(plain, "train")
    assert features_key(task, "test") == features_key(plain, "test")


def test_mirror_images_are_trained_on_with_theirs_and_never_validated_on(images: Path) -> None:
    plain = open_task(small_config(images, ("first",)), "first")
    task = open_task(small_config(images, (flipped(images),)), "first")
    assert task.n_folds() == 2
    for number in range(2):
        (rows, held), (expected, same) = task.fold(number), plain.fold(number)
        np.testing.assert_array_equal(held, same)
        np.testing.assert_array_equal(rows, np.concatenate([expected, expected + 20]))
    few, of_plain = task.subset("train", 3), plain.subset("train", 3)
    np.testing.assert_array_equal(few, np.concatenate([of_plain, of_plain + 20]))
    np.testing.assert_array_equal(task.subset("train"), np.arange(40))


def test_a_bad_image_is_bad_in_the_mirror_too(images: Path, tmp_path: Path) -> None:
    write_task(tmp_path, "first")
    table = pq.read_table(tmp_path / "first" / "train.parquet").to_pydict()
    table["image_bytes"][4] = b"no image"
    pq.write_table(pa.table(table), tmp_path / "first" / "train.parquet")
    task = open_task(small_config(tmp_path, (flipped(tmp_path),), on_bad_image="skip"), "first")
    assert task.read("train", [24]) == task.read("train", [4])
    with pytest.raises(UserError, match="2 bad images"):
        run_all(small_config(tmp_path, (flipped(tmp_path),)), RunDirectory(str(tmp_path / "run")))


@pytest.mark.usefixtures("cluster")
def test_a_run_with_mirror_images(images: Path, tmp_path: Path) -> None:
    config = small_config(images, (flipped(images),), methods=["head2toe", "tap_kernels"], seeds=[0])
    run = RunDirectory(str(tmp_path))
    run_all(config, run)
    task = open_task(config, "first")
    matrix = read_features(run, features(task, "train", 16).names(run))
    np.testing.assert_array_equal(matrix.index, np.arange(40))
    assert not np.allclose(matrix.values[:20], matrix.values[20:])  # type: ignore[index]
    assert set(result_rows(run)["n_train"]) == {40}
    assert set(frame(run, "trials")["n_validation"]) == {10}
