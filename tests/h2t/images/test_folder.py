"""Folders of images, a class each."""

import os
from pathlib import Path

import numpy as np
import pytest

from h2t.errors import UserError
from h2t.images import folder
from h2t.images.folder import open_folder
from h2t.images.formats import open_source
from h2t.images.preprocessing import decode
from h2t.images.source import SourceUnavailable, check_rows
from h2t.tasks import Task

TASK = Task("birds", "Birds", "other", 0, n_train=0)


@pytest.fixture
def tree(tmp_path: Path, encode):
    """Writes images of a brightness of their own at the paths; returns the root."""

    def write(*paths):
        for number, path in enumerate(paths):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(encode(np.full((2, 2, 3), number, dtype=np.uint8)))
        return tmp_path

    return write


def by_label(source, split):
    """Brightness of the images of each label."""
    labels = source.labels(split)
    values = [int(decode(image)[0, 0, 0]) for image in source.read(split, range(len(labels)))]
    return {
        label: sorted(v for v, each in zip(values, labels, strict=True) if each == label)
        for label in set(labels)
    }


def test_train_and_test_folders(tree) -> None:
    root = tree(
        "train/crow/a.png", "train/crow/b.png", "train/owl/a.png", "test/owl/a.png", "test/wren/a.png"
    )
    source = open_source("folder", TASK, str(root), {})
    assert by_label(source, "train") == {0: [0, 1], 1: [2]}
    assert by_label(source, "test") == {1: [3], 2: [4]}
    assert source.class_names() == open_folder(TASK, str(root)).class_names() == ("crow", "owl", "wren")
    assert source.provenance()["rows"] == "train/ and test/"
    assert source.provenance()["order"] == "shuffled, seed 0"


def test_numbered_classes_come_in_the_order_of_their_numbers(tree) -> None:
    root = tree(*[f"train/{number}/a.png" for number in range(12)], "test/0/a.png")
    assert by_label(open_source("folder", TASK, str(root), {}), "train") == {
        number: [number] for number in range(12)
    }


def test_a_seeded_split_takes_its_share_of_every_class(tree) -> None:
    root = tree(*[f"{name}/{number}.png" for name in ("crow", "owl") for number in range(10)])
    source = open_source("folder", TASK, str(root), {"test_fraction": 0.3})
    test, train = by_label(source, "test"), by_label(source, "train")
    assert [len(test[label]) for label in (0, 1)] == [3, 3]
    assert sorted(test[0] + train[0]) == list(range(10))
    assert sorted(test[1] + train[1]) == list(range(10, 20))
    again = open_source("folder", TASK, str(root), {"test_fraction": 0.3})
    np.testing.assert_array_equal(again.labels("train"), source.labels("train"))
    assert by_label(open_source("folder", TASK, str(root), {"test_fraction": 0.3, "seed": 1}), "test") != test


def test_rows_are_mixed_for_consecutive_folds_unless_told_otherwise(tree) -> None:
    root = tree(*[f"train/{name}/{number}.png" for name in "ab" for number in range(20)], "test/a/a.png")
    mixed = open_source("folder", TASK, str(root), {}).labels("train")
    assert 0 < mixed[:20].sum() < 20
    assert open_source("folder", TASK, str(root), {"shuffle": 1}).labels("train").tolist() != mixed.tolist()


def test_other_files_are_no_rows_but_told_and_other_tasks_are_no_classes(tree, tmp_path: Path) -> None:
    root = tree("birds/crow/a.PNG", "birds/crow/.hidden.png", "birds/crow/b.png", "fish/train/cod/a.png")
    (tmp_path / "birds" / "crow" / "notes.txt").write_text("seen at dawn")
    (tmp_path / "birds" / "list.csv").write_text("a,b")
    source = open_source("folder", TASK, str(root), {"test_fraction": 0.5})
    assert len(source.labels("train")) == len(source.labels("test")) == 1
    assert [(Path(file.path).name, file.reason) for file in source.left_out()] == [
        ("list.csv", "left out: not in the folder of a class"),
        ("notes.txt", "left out: '.txt' is no ending of an image file that Pillow reads"),
    ]
    absent = Task("snakes", "Snakes", "other", 0)
    with pytest.raises(SourceUnavailable, match=r"fish holds a folder train, so it is no class: expected"):
        open_source("folder", absent, str(root), {})


def test_an_empty_split_and_too_many_classes(tree, tmp_path: Path) -> None:
    root = tree("train/crow/a.png", "train/owl/a.png", "train/tit/a.png")
    (tmp_path / "test").mkdir()
    two_classes = Task("birds", "Birds", "other", 2)
    source = open_source("folder", two_classes, str(root), {})
    assert [row.reason for row in check_rows(source, two_classes, "test")] == ["the split has no images"]
    (row,) = check_rows(source, two_classes, "train")
    assert row.path.endswith("train/tit/a.png")
    assert row.reason == "label 2 is out of range: expected 0 to 1"
    assert source.labels("train")[row.index] == 2


def test_every_image_is_used_whatever_the_names_of_files_and_folders_and_however_deep(tree) -> None:
    root = tree(
        "train/_background_noise_/_DSC0001.JPG", "train/_background_noise_/a.jfif",
        "train/owl/images/_MG_1.jpg", "train/owl/images/deeper/b.jp2", "train/owl/c.png", "test/owl/d.avif",
    )  # fmt: skip
    source = open_source("folder", TASK, str(root), {})
    assert source.class_names() == ("_background_noise_", "owl")
    assert by_label(source, "train") == {0: [0, 1], 1: [2, 3, 4]}
    assert by_label(source, "test") == {1: [5]}


def test_links_to_nothing_are_bad_rows(tree) -> None:
    root = tree("train/crow/a.png", "train/owl/a.png", "test/owl/a.png")
    (root / "train" / "owl" / "b.png").symlink_to(root / "moved" / "b.png")
    source = open_source("folder", TASK, str(root), {"shuffle": 1})
    (row,) = check_rows(source, TASK, "train")
    assert row.path.endswith("train/owl/b.png")
    assert row.reason == "a link to nothing"
    assert source.name("train", row.index) == row.path


@pytest.mark.parametrize("place", ["train/owl", "train/owl/nested", "train"])
def test_a_name_that_is_not_utf8_is_named(place: str, tree) -> None:
    root = tree("train/crow/a.png", "train/owl/nested/a.png", "test/owl/a.png")
    Path(os.fsdecode(os.fsencode(root / place) + b"/ma\xf1ana.png")).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{place}: expected names in UTF-8, got 'ma\\xf1ana\.png'"):
        open_source("folder", TASK, str(root), {}).labels("train")


def test_splits_of_other_names(tree) -> None:
    root = tree("train/crow/a.png", "train/owl/a.png", "val/owl/a.png")
    source = open_source("folder", TASK, str(root), {})
    assert source.labels("train").tolist() == [0, 1]
    message = r"no 'test' for the test split in .*, which has train, val; say which to take with images"
    with pytest.raises(SourceUnavailable, match=message):
        source.labels("test")
    source = open_source("folder", TASK, str(root), {"test": "val"})
    assert source.labels("test").tolist() == [1]


def test_no_images_at_all(tmp_path: Path) -> None:
    (tmp_path / "train" / "crow").mkdir(parents=True)
    with pytest.raises(SourceUnavailable, match="no folders of classes with images"):
        open_source("folder", TASK, str(tmp_path), {})


def test_folders_of_splits_are_not_taken_for_classes(tree) -> None:
    root = tree("training/crow/a.png", "training/owl/a.png", "validation/owl/a.png")
    with pytest.raises(SourceUnavailable, match="holds the folders training, validation: expected train and"):
        open_source("folder", TASK, str(root), {})
    source = open_source("folder", TASK, str(root), {"train": "training", "test": "validation"})
    assert source.labels("train").tolist() == [0, 1]


def test_wrong_settings(tree, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test_fraction: expected a number between 0 and 1, got 1"):
        open_source("folder", TASK, str(tree("a/a.png")), {"test_fraction": 1})
    with pytest.raises(UserError, match="seed: expected 0 or more, got -1"):
        open_source("folder", TASK, str(tmp_path), {"seed": -1})
    with pytest.raises(UserError, match="option 'seed' of folder images: expected int, got 'one'"):
        open_source("folder", TASK, str(tmp_path), {"seed": "one"})
    with pytest.raises(SourceUnavailable, match=r"a\.png is a file, expected a folder"):
        open_source("folder", TASK, str(tmp_path / "a" / "a.png"), {})
    with pytest.raises(UserError, match="option 'test_fraction' of folder images: expected"):
        open_source("folder", TASK, str(tmp_path), {"test_fraction": "a fifth"})
    with pytest.raises(SourceUnavailable, match="are not at"):
        open_source("folder", TASK, str(tmp_path / "nowhere"), {})


@pytest.mark.parametrize("parts", [("train/", "test/"), ("",)])
def test_folders_are_listed_once_however_many_rows_are_read(parts, tree, monkeypatch) -> None:
    root = tree(*[f"{part}{name}/{n}.png" for part in parts for name in ("crow", "owl") for n in range(5)])
    source = open_folder(TASK, str(root))
    for split in ("train", "test"):
        source.labels(split)
    monkeypatch.setattr(folder, "list_folders", None)
    monkeypatch.setattr(folder, "list_files", None)
    assert len(source.read("train", range(len(source.labels("train"))))) == (10 if len(parts) > 1 else 8)
