"""What people's folders, files and recipes are like, through the pipeline."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.numpy import load
from safetensors.torch import save_file

from h2t.backbones.loading import load_backbone
from h2t.errors import UserError
from pipelines.config import Config
from pipelines.run import STAGES, run_stages
from pipelines.run_directory import RunDirectory
from pipelines.task_data import open_task
from tests.pipelines.conftest import frame, output, png, result_rows, run_all, small_config

pytestmark = pytest.mark.usefixtures("cluster")

ONE_POINT = {"target_size": [16], "steps": [5], "keep_fraction": [0.2]}


def write_classes(root: Path, classes: tuple[str, ...] = ("ant", "bee"), n_images: int = 12) -> Path:
    """Folders of bright and dark images, by class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", n_images), ("test", 4)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (32, 32, 3), np.uint8) + np.uint8(40 * label)
                (folder / f"{number}.png").write_bytes(png(pixels))
    return root


def config_of(root: Path, **settings: object) -> Config:
    task = {"name": "flowers", "group": "other", "images": {"format": "folder", "root": str(root)}}
    return small_config(root, tasks=[task], methods=["linear"], grid=ONE_POINT, **settings)


def test_a_task_called_flowers_has_the_classes_of_its_folder(tmp_path: Path) -> None:
    task = open_task(config_of(write_classes(tmp_path, ("ant", "bee", "crab"))), "flowers")
    assert (task.n_classes, task.task.title) == (3, "flowers")


def test_classes_are_checked_before_anything_runs(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "images", ("ant", "bee"))
    (root / "train" / "zebra").mkdir()
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"task flowers: no training images of 1 of 3 classes \('zebra'\)"):
        run_stages(config_of(root), str(run), list(STAGES), Console(quiet=True))
    assert not run.exists()


def test_labels_that_are_ids_are_mapped_where_asked(tmp_path: Path) -> None:
    images = [png(np.full((8, 8, 3), 10 * number, np.uint8)) for number in range(24)]
    for split in ("train", "test"):
        labels = [(17, 9203)[number % 2] for number in range(24)]
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / f"{split}.parquet")
    images_of_task: dict[str, object] = {"format": "parquet", "root": str(tmp_path)}
    task = {"name": "ids", "images": images_of_task}
    with pytest.raises(UserError, match=r"images\.options\.label_map, such as \{17: class0, 9203: class1\}"):
        open_task(small_config(tmp_path, tasks=[task]), "ids")
    images_of_task["options"] = {"label_map": {17: "ant", 9203: "bee"}}
    opened = open_task(small_config(tmp_path, tasks=[task]), "ids")
    assert opened.n_classes == 2
    assert opened.sources["train"][0].class_names() == ("ant", "bee")


def test_files_that_are_no_rows_are_counted_named_and_forgotten_once_they_are_gone(tmp_path: Path) -> None:
    root, run = write_classes(tmp_path / "images"), RunDirectory(str(tmp_path / "run"))
    stray = root / "train" / "ant" / "Thumbs.db"
    stray.write_bytes(b"not one")
    console = Console(file=io.StringIO(), width=300)
    run_stages(config_of(root), run.uri, ["extract"], console)
    assert "flowers: 1 files, such as" in output(console)
    assert "'.db' is no ending of an image file that Pillow reads" in output(console)
    assert frame(run, "bad_rows")[["index", "path"]].to_numpy().tolist() == [[-1, str(stray)]]
    stray.unlink()
    run_stages(config_of(root), run.uri, ["extract"], Console(quiet=True))
    assert not run.names("bad_rows", recursive=True)


@pytest.mark.slow
def test_links_to_nothing_are_bad_rows_and_mended_ones_are_forgotten(tmp_path: Path) -> None:
    root, run = write_classes(tmp_path / "images"), RunDirectory(str(tmp_path / "run"))
    link = root / "train" / "bee" / "linked.png"
    link.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(UserError, match=r"1 bad images; .*\n.*bee/linked\.png\): a link to nothing"):
        run_stages(config_of(root), run.uri, ["extract"], Console(quiet=True))
    console = Console(file=io.StringIO(), width=300)
    run_stages(config_of(root, on_bad_image="skip"), run.uri, ["extract"], console)
    assert "1 bad images left out, such as" in output(console)
    assert list(frame(run, "bad_rows")["reason"]) == ["a link to nothing"]
    (tmp_path / "elsewhere.png").write_bytes((root / "train" / "bee" / "0.png").read_bytes())
    run_stages(config_of(root, on_bad_image="skip"), run.uri, ["extract"], Console(quiet=True))
    assert not run.names("bad_rows", recursive=True)


def features_of(config: Config, run: RunDirectory) -> pd.DataFrame:
    run_stages(config, run.uri, ["extract"], Console(quiet=True))
    return frame(run, "features").sort_values("index", ignore_index=True)


@pytest.mark.slow
def test_images_swapped_under_the_same_names_are_read_again(tmp_path: Path) -> None:
    root, run = write_classes(tmp_path / "images"), RunDirectory(str(tmp_path / "run"))
    before = features_of(config_of(root), run)
    for split in ("train", "test"):
        folder = root / split
        (folder / "ant").rename(folder / "held")
        (folder / "bee").rename(folder / "ant")
        (folder / "held").rename(folder / "bee")
    after = features_of(config_of(root), run)
    pd.testing.assert_series_equal(after["label"], before["label"])
    assert not after["pre_logits"].equals(before["pre_logits"])
    pd.testing.assert_frame_equal(after, features_of(config_of(root), RunDirectory(str(tmp_path / "fresh"))))


@pytest.mark.slow
def test_other_weights_in_the_same_file_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root, run = write_classes(tmp_path / "images"), RunDirectory(str(tmp_path / "run"))
    read = []
    for seed in (1, 2):
        model = load_backbone("test_efficientnet", weights="random", image_size=32, seed=seed).model
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, "mine.safetensors")
        # Workers have other working folders.
        read.append(features_of(config_of(root, backbone={"weights": "mine.safetensors"}), run))
    assert len(read[0]) == len(read[1]) == 24
    assert not read[0]["pre_logits"].equals(read[1]["pre_logits"])


@pytest.mark.slow
def test_a_head_that_is_made_again_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    """Alone, where it was made beside others."""
    root, run = write_classes(tmp_path / "images"), RunDirectory(str(tmp_path / "run"))
    grid = {**ONE_POINT, "learning_rate": [0.1]}
    config = config_of(root).model_copy(update={"methods": ["linear", "all_l2", "all_l1", "head2toe"]})
    config = config.model_copy(update={"grid": config.grid.model_copy(update=grid)})
    run_all(config, run)
    rows = result_rows(run)
    for victim in [name for name in run.names("heads", recursive=True) if name.endswith("safetensors")][::7]:
        before = load(run.read(victim))
        run.delete(victim)
        run_stages(config, run.uri, ["evaluate"], Console(quiet=True))
        after = load(run.read(victim))
        assert all(np.array_equal(before[name], after[name]) for name in before)
    pd.testing.assert_frame_equal(result_rows(run), rows)
