"""The VTAB-1k archive: written as people have it, read back, and broken."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from h2t.images.formats import open_source
from h2t.images.preprocessing import decode
from h2t.images.source import BadImage, SourceUnavailable, check_rows
from h2t.tasks import VTAB_1K, Task, find_task

PETS = find_task("pets")
CIFAR = find_task("cifar")


class Archive:
    """Writes one task's folder."""

    def __init__(self, root, folder, encode):
        self.root, self.base, self.encode = root, root / folder, encode
        self.base.mkdir(parents=True)

    def add(self, split, labels, format="PNG", seed=0, **options):
        """Images of noise with the labels, listed in <split>.txt."""
        folder = self.base / "images" / split
        folder.mkdir(parents=True)
        generator = np.random.default_rng(seed)
        pixels = generator.integers(0, 256, (len(labels), 5, 7, 3), dtype=np.uint8)
        names = [f"images/{split}/{number:06d}.{format.lower()}" for number in range(len(labels))]
        for name, image in zip(names, pixels, strict=True):
            (self.base / name).write_bytes(self.encode(image, format, **options))
        lines = [f"{name} {label}" for name, label in zip(names, labels, strict=True)]
        self.write(f"{split}.txt", lines)
        return pixels

    def write(self, name, lines) -> None:
        """A list of images."""
        (self.base / name).write_text("\n".join(lines) + "\n")

    def open(self, task, **options):
        """The source."""
        return open_source("vtab1k", task, str(self.root), options)


@pytest.fixture
def archive(tmp_path: Path, encode):
    def make(folder="oxford_iiit_pet"):
        return Archive(tmp_path / "vtab-1k", folder, encode)

    return make


@pytest.mark.parametrize("task", VTAB_1K, ids=lambda task: task.name)
def test_every_task_is_found_in_its_folder(task, archive) -> None:
    made = archive(task.folder)
    pixels = made.add("train800val200", [1, 0, 1])
    made.add("test", [0])
    source = made.open(task)
    assert source.labels("train").tolist() == [1, 0, 1]
    assert source.labels("train").dtype == np.int32
    np.testing.assert_array_equal(decode(source.read("train", [2])[0]), pixels[2])


@pytest.mark.parametrize("folder", ["pets", "oxford_iiit_pet", "oxford_pets"])
def test_folders_named_by_an_alias(folder, archive) -> None:
    made = archive(folder)
    made.add("train800val200", [3])
    made.add("test", [4])
    assert made.open(PETS).labels("test").tolist() == [4]


@pytest.mark.parametrize(
    ("format", "options"), [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("GIF", {})]
)
def test_any_image_format(format: str, options, archive) -> None:
    made = archive()
    pixels = made.add("train800val200", [0, 1], format, **options)
    made.add("test", [0], format, **options)
    decoded = decode(made.open(PETS).read("train", [1])[0])
    assert decoded.shape == pixels[1].shape
    if format in ("PNG", "WEBP", "BMP"):
        np.testing.assert_array_equal(decoded, pixels[1])


def test_file_order_is_kept_and_rows_are_random_access(archive) -> None:
    made = archive()
    pixels = made.add("train800val200", range(6))
    made.add("test", [0])
    order = [4, 0, 5, 2, 1, 3]
    made.write("train800val200.txt", [f"images/train800val200/{row:06d}.png {row}" for row in order])
    source = pickle.loads(pickle.dumps(made.open(PETS)))  # noqa: S301
    assert source.labels("train").tolist() == order
    images = source.read("train", [5, 0, 0])
    np.testing.assert_array_equal(np.stack([decode(image) for image in images]), pixels[[3, 4, 4]])


def test_two_lists_stand_in_for_the_joint_one(archive) -> None:
    made = archive()
    first, second = made.add("train800", [5, 6], seed=1), made.add("val200", [7], seed=2)
    made.add("test", [0])
    source = made.open(PETS)
    assert source.labels("train").tolist() == [5, 6, 7]
    decoded = np.stack([decode(image) for image in source.read("train", range(3))])
    np.testing.assert_array_equal(decoded, np.concatenate([first, second]))
    assert source.provenance()["rows"] == "train800.txt and val200.txt"
    made.add("train800val200", [5, 6, 7])
    assert made.open(PETS).provenance()["rows"] == "train800val200.txt"
    made.write("train800val200.txt", [f"images/train800val200/{row:06d}.png {7 - row}" for row in range(3)])
    assert "not in the order of" in made.open(PETS).provenance()["rows"]


def test_lossy_copies_are_recognised_by_content_not_by_name(archive) -> None:
    made = archive("cifar")
    made.add("train800val200", [0, 1], "JPEG")
    made.add("test", [0])
    assert made.open(CIFAR).provenance()["encoding"] == "lossy JPEG copy"
    path = made.base / "images" / "train800val200" / "000000.jpeg"
    path.write_bytes(made.encode(np.zeros((4, 4, 3), np.uint8)))
    assert made.open(CIFAR).provenance()["encoding"] == "PNG"


@pytest.mark.parametrize(
    ("options", "encoding"), [({}, "JPEG of quality 75, probably re-encoded"), ({"quality": 92}, "JPEG")]
)
def test_jpeg_of_a_task_that_was_jpeg_before(options, encoding: str, archive) -> None:
    made = archive()
    made.add("train800val200", [0], "JPEG", **options)
    made.add("test", [0])
    assert made.open(PETS).provenance()["encoding"] == encoding


def test_lines_as_other_tools_write_them(archive) -> None:
    made = archive()
    made.add("train800val200", [0, 1])
    made.add("test", [0])
    (made.base / "images" / "my photo.png").write_bytes(made.encode(np.zeros((2, 2, 3), np.uint8)))
    lines = ["", "  ./images//train800val200/000000.png   11  ", "images/my photo.png\t12", "  "]
    (made.base / "train800val200.txt").write_bytes("\r\n".join(lines).encode())
    source = made.open(PETS)
    assert source.labels("train").tolist() == [11, 12]
    assert check_rows(source, PETS, "train") == []
    assert decode(source.read("train", [1])[0]).shape == (2, 2, 3)


def test_bad_rows_are_listed_and_keep_their_places(archive) -> None:
    made = archive()
    made.add("train800val200", range(6))
    made.add("test", [0])
    folder = "images/train800val200"
    made.write(
        "train800val200.txt",
        [
            f"{folder}/000000.png 0",
            f"{folder}/000001.png",
            f"{folder}/000099.png 2",
            f"{folder}/000003.png 37",
            f"{folder}/000000.png 0",
            f"{folder}/000005.png -1",
            f"{folder}/000002.png 2",
        ],
    )
    source = made.open(PETS)
    assert source.labels("train").tolist() == [0, -1, 2, 37, 0, -1, 2]
    bad = {row.index: row for row in check_rows(source, PETS, "train")}
    assert list(bad) == [1, 2, 3, 4, 5]
    assert bad[1].path.endswith("train800val200.txt:2")
    assert bad[1].reason == f"expected 'path label', got '{folder}/000001.png'"
    assert bad[2].reason == "missing file"
    assert bad[2].path.endswith("oxford_iiit_pet/images/train800val200/000099.png")
    assert bad[3].reason == "label 37 is out of range: expected 0 to 36"
    assert bad[3].path.endswith("000003.png")
    assert bad[4].reason == "listed twice, first as row 0"
    assert bad[5].path.endswith("train800val200.txt:6")
    assert {row.task for row in bad.values()} == {"oxford_iiit_pet"}
    good, missing = source.read("train", [6, 2])
    assert decode(good).shape == (5, 7, 3)
    with pytest.raises(BadImage, match="missing or empty"):
        decode(missing)


def test_paths_that_can_be_no_file(archive) -> None:
    made = archive()
    made.add("train800val200", [0])
    made.add("test", [0])
    folder = "images/train800val200"
    lines = {
        folder: "missing file",  # a directory
        f"{folder}/000000.png/more.png": "missing file",
        f"{folder}/{'x' * 5000}.png": "missing file",
        f"{folder}/\0.png": "expected 'path label'",
        f"{folder}/000000.png": "",
        f"./{folder}//000000.png": "listed twice, first as row 4",
    }
    made.write("train800val200.txt", [*(f"{path} 0" for path in lines), "no_label.png " + "9" * 5000])
    source = made.open(PETS)
    reasons = {row.index: row.reason for row in check_rows(source, PETS, "train")}
    for row, reason in enumerate([*lines.values(), "expected 'path label'"]):
        assert reasons.get(row, "").startswith(reason)
    assert 4 not in reasons
    assert source.provenance()["encoding"] == "PNG"  # of the one row that is an image


def test_empty_split_and_missing_lists(archive) -> None:
    made = archive()
    made.add("train800val200", [0])
    (made.base / "test.txt").write_text("\n")
    (row,) = check_rows(made.open(PETS), PETS, "test")
    assert (row.index, row.reason) == (-1, "the split has no images")
    (made.base / "test.txt").unlink()
    with pytest.raises(SourceUnavailable, match=r"no list of the test images in .*: expected test\.txt"):
        made.open(PETS).labels("test")


def test_a_mended_archive_is_read_anew(archive) -> None:
    made = archive()
    made.add("train800val200", [0])
    made.add("test", [99])
    assert len(check_rows(made.open(PETS), PETS, "test")) == 1
    made.write("test.txt", ["images/test/000000.png 9"])
    assert check_rows(made.open(PETS), PETS, "test") == []


def test_a_task_of_a_users_own_counts_its_classes(archive) -> None:
    made = archive("mushrooms")
    made.add("train800val200", [0, 2])
    made.add("test", [4, 1])
    task = Task("mushrooms", "Mushrooms", "other", 0)
    source = made.open(task)
    assert check_rows(source, task, "test") == []


def test_what_is_not_there(archive, tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match=r"no folder cifar/"):
        archive("dtd").open(CIFAR)
    with pytest.raises(SourceUnavailable, match="are not at"):
        open_source("vtab1k", CIFAR, str(tmp_path / "nowhere"), {})
    with pytest.raises(SourceUnavailable, match="need a root"):
        open_source("vtab1k", CIFAR, None, {})


def test_roots_may_be_uris(archive) -> None:
    made = archive()
    pixels = made.add("train800val200", [0])
    made.add("test", [0])
    source = open_source("vtab1k", PETS, made.root.as_uri(), {})
    np.testing.assert_array_equal(decode(source.read("train", [0])[0]), pixels[0])
    assert check_rows(source, PETS, "train") == []
