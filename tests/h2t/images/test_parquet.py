"""Parquet of images as hubs write it, and as people do."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from h2t.errors import UserError
from h2t.images import parquet
from h2t.images.formats import open_source
from h2t.images.preprocessing import decode
from h2t.images.source import BadImage, SourceUnavailable, check_rows
from h2t.tasks import Task, find_task

FLOWERS = Task("flowers_at_home", "Flowers", "other", 0, n_train=0)


@pytest.fixture
def noise(encode):
    """PNG bytes of images that differ by seed, and their pixels."""

    def make(n_images, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (n_images, 4, 3, 3), dtype=np.uint8)
        return pixels, [encode(image) for image in pixels]

    return make


def flat(images, labels, image="image", label="label", **columns):
    return pa.table({image: pa.array(images, pa.binary()), label: labels, **columns})


def struct(images, labels, **columns):
    both = [{"bytes": image, "path": f"{number}.png"} for number, image in enumerate(images)]
    return pa.table({"image": both, "label": labels, **columns})


def pixels_of(source, split, rows):
    return np.stack([decode(image) for image in source.read(split, rows)])


def opened(root, task=FLOWERS, **options):
    return open_source("parquet", task, str(root), options)


@pytest.mark.parametrize("make", [flat, struct])
@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-0.parquet", "data/test-0.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("split=train/part-0.parquet", "split=test/part-0.parquet"),
        ("flowers_at_home/train.parquet", "flowers_at_home/test.parquet"),
    ],
)
def test_layouts(make, names, tmp_path: Path, noise) -> None:
    for seed, (name, labels) in enumerate(zip(names, ([2, 0, 1], [1, 1]), strict=True)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(make(noise(len(labels), seed)[1], labels), tmp_path / name, row_group_size=2)
    source = opened(tmp_path)
    assert source.labels("train").tolist() == [2, 0, 1]
    assert source.labels("test").tolist() == [1, 1]
    assert source.labels("test").dtype == np.int32
    np.testing.assert_array_equal(pixels_of(source, "train", [2, 0, 2]), noise(3, 0)[0][[2, 0, 2]])
    np.testing.assert_array_equal(pixels_of(source, "test", [1]), noise(2, 1)[0][1:])
    assert source.provenance()["encoding"] == "PNG"


@pytest.mark.parametrize("make", [flat, struct])
def test_one_file_with_a_column_of_splits(make, tmp_path: Path, noise) -> None:
    pixels, images = noise(5)
    path = tmp_path / "everything.parquet"
    pq.write_table(make(images, [0, 1, 2, 3, 4], split=["train", "test", "train", "train", "test"]), path)
    for source in (opened(path), opened(tmp_path)):
        assert source.labels("train").tolist() == [0, 2, 3]
        assert source.labels("test").tolist() == [1, 4]
        np.testing.assert_array_equal(pixels_of(source, "test", [0, 1]), pixels[[1, 4]])


@pytest.mark.parametrize(
    ("image", "label"), [("img", "fine_label"), ("webp", "cls"), ("image_bytes", "labels")]
)
def test_usual_column_names_are_found(image, label, tmp_path: Path, noise) -> None:
    for split in ("train", "test"):
        pq.write_table(
            flat(noise(2)[1], [0, 1], image, label, caption=["a", "b"]), tmp_path / f"{split}.parquet"
        )
    np.testing.assert_array_equal(pixels_of(opened(tmp_path), "train", [1]), noise(2)[0][1:])


def test_columns_and_splits_by_option(tmp_path: Path, noise) -> None:
    for split in ("train", "validation", "test"):
        table = flat(noise(2)[1], [0, 1], "photo", "species", page=[7, 7])
        pq.write_table(table, tmp_path / f"{split}.parquet")
    source = opened(tmp_path, image="photo", label="species", test="validation")
    assert source.labels("test").tolist() == [0, 1]
    np.testing.assert_array_equal(pixels_of(source, "test", [0]), noise(2)[0][:1])
    with pytest.raises(UserError, match=r"unknown label column of .* 'specie': did you mean species"):
        opened(tmp_path, label="specie").labels("train")


def test_rows_are_keyed_by_the_index_column_across_files(tmp_path: Path, noise) -> None:
    pixels, images = noise(6)
    order = np.array([3, 5, 0, 4, 1, 2])
    for part, rows in enumerate(np.split(order, 2)):
        table = flat([images[row] for row in rows], rows.tolist(), index=rows.tolist())
        pq.write_table(table, tmp_path / f"train-{part}.parquet", row_group_size=2)
    pq.write_table(flat(images, range(6)), tmp_path / "test.parquet")
    source = pickle.loads(pickle.dumps(opened(tmp_path)))  # noqa: S301
    assert source.labels("train").tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(pixels_of(source, "train", range(6)), pixels)


def test_files_come_in_the_order_of_their_numbers(tmp_path: Path, noise) -> None:
    _, images = noise(12)
    for number in range(12):
        pq.write_table(flat(images[number : number + 1], [number]), tmp_path / f"train-{number}.parquet")
    assert opened(tmp_path).labels("train").tolist() == list(range(12))


def test_other_tasks_beside_this_one_are_left_alone(tmp_path: Path, noise) -> None:
    for name in ("dtd", "svhn"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            pq.write_table(flat(noise(1)[1], [3]), tmp_path / name / f"{split}.parquet")
    assert opened(tmp_path, find_task("dtd")).labels("train").tolist() == [3]
    with pytest.raises(SourceUnavailable, match="no Parquet files of kitti"):
        opened(tmp_path, find_task("kitti"))


def test_bad_rows(tmp_path: Path, noise) -> None:
    _, images = noise(5)
    labels = pa.array([0, None, -4, 2**40, 1], pa.int64())
    table = flat([*images[:4], None], labels, index=[0, 1, 2, 3, 3])
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(flat([], pa.array([], pa.int64())), tmp_path / "test.parquet")
    source = opened(tmp_path)
    assert source.labels("train").tolist() == [0, -1, -1, -1, 1]
    bad = {row.index: row for row in check_rows(source, FLOWERS, "train")}
    assert list(bad) == [1, 2, 3, 4]
    assert "no label" in bad[1].reason
    assert bad[4].reason == "index 3 occurs twice"
    assert bad[4].path.endswith("train.parquet#0:4")
    assert [row.reason for row in check_rows(source, FLOWERS, "test")] == ["the split has no images"]
    with pytest.raises(BadImage, match=r"train\.parquet#0:4: missing or empty"):
        decode(source.read("train", [4])[0])


def test_files_that_are_something_else(tmp_path: Path, noise) -> None:
    _, images = noise(2)
    path = tmp_path / "train.parquet"
    pq.write_table(flat(images, [0.5, 1.5]), path)
    with pytest.raises(UserError, match=r"labels must be integers: column 'label' of .* is double"):
        opened(tmp_path).labels("train")
    pq.write_table(flat(images, [0, 1], label="breed"), path)
    with pytest.raises(
        UserError, match=r"no label column in .*: expected one of label, cls.*the file has image, breed"
    ):
        opened(tmp_path).labels("train")
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "label": [0, 1]}), path)
    with pytest.raises(UserError, match=r"column 'image' of .* is string: expected binary"):
        opened(tmp_path).read("train", [0])
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        opened(tmp_path).labels("train")
    pq.write_table(flat(images, [0, 1]), path)
    with pytest.raises(UserError, match="not named after one split and has no column 'split'"):
        opened(path).labels("train")
    path.rename(tmp_path / "birds.parquet")
    with pytest.raises(UserError, match="not named after one split and has no column 'split'"):
        opened(tmp_path).labels("test")


def test_a_column_of_images_is_looked_for_before_any_is_read(tmp_path: Path, noise) -> None:
    _, images = noise(2)
    for table, message in (
        (pa.table({"label": [0, 1]}), r"no image column in .*train\.parquet: expected one of image"),
        (pa.table({"image": ["a.png", "b.png"], "label": [0, 1]}), "column 'image' of .* is string"),
    ):
        pq.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(UserError, match=message):
            opened(tmp_path).labels("train")
    pq.write_table(flat(images, [0, 1]), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"unknown image column of .* 'imag': did you mean image"):
        opened(tmp_path, image="imag").labels("train")


def test_only_integers_number_the_rows(tmp_path: Path, noise) -> None:
    _, images = noise(3)
    pq.write_table(flat(images, [0, 1, 2], index=["c", "a", "b"]), tmp_path / "train.parquet")
    assert opened(tmp_path).labels("train").tolist() == [0, 1, 2]
    pq.write_table(flat(images, [0, 1, 2], index=pa.array([1, None, 0])), tmp_path / "train.parquet")
    source = opened(tmp_path)
    bad = {row.path[-3:]: row.reason for row in check_rows(source, FLOWERS, "train")}
    assert bad == {"0:1": "no index, or one that is negative"}
    assert len(source.labels("train")) == 3


def test_damage_inside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(flat([b"photograph" * 500] * 4, range(4)), path, compression="zstd", use_dictionary=False)
    content = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    path.write_bytes(content[: start + 40] + b"\x07" * 30 + content[start + 70 :])
    with pytest.raises(UserError, match=r"train\.parquet cannot be read as Parquet"):
        opened(tmp_path).read("train", [0])
    path.write_bytes(content[:-60] + b"\xff" * 50 + content[-10:])
    with pytest.raises(UserError, match=r"train\.parquet cannot be read as Parquet"):
        opened(tmp_path).labels("train")


def test_more_rows_than_there_are(tmp_path: Path, noise) -> None:
    for split in ("train", "test"):
        pq.write_table(flat(noise(3)[1], range(3)), tmp_path / f"{split}.parquet")
    assert len(opened(tmp_path, n_train=3).labels("train")) == 3
    with pytest.raises(UserError, match="n_train: expected at most the 3 images that there are, got 4"):
        opened(tmp_path, n_train=4).labels("train")


def test_large_binary_and_a_seeded_part(tmp_path: Path, noise) -> None:
    pixels, images = noise(20)
    for split in ("train", "test"):
        table = pa.table(
            {"image": pa.array(images, pa.large_binary()), "label": pa.array(range(20), pa.uint8())}
        )
        pq.write_table(table, tmp_path / f"{split}.parquet", row_group_size=3)
    part = opened(tmp_path, shuffle=5, n_train=8)
    labels = part.labels("train")
    assert len(set(labels)) == 8
    assert labels.tolist() != sorted(labels)
    np.testing.assert_array_equal(labels, opened(tmp_path, shuffle=5).labels("train")[:8])
    np.testing.assert_array_equal(pixels_of(part, "train", range(8)), pixels[labels])
    assert part.labels("test").tolist() != opened(tmp_path, shuffle=5).labels("train").tolist()
    assert part.provenance()["order"] == "shuffled, seed 5, first 8 of train"
    assert opened(tmp_path, n_test=2).labels("test").tolist() == [0, 1]


def test_images_beside_the_file_that_names_them(tmp_path: Path, noise) -> None:
    pixels, images = noise(3)
    (tmp_path / "images").mkdir()
    for number in (0, 2):
        (tmp_path / "images" / f"{number}.png").write_bytes(images[number])
    stored = [
        {"bytes": None, "path": "images/0.png"},
        {"bytes": images[1], "path": "1.png"},
        {"bytes": None, "path": "images/2.png"},
        {"bytes": None, "path": "images/lost.png"},
        {"bytes": None, "path": None},
    ]
    for name in ("train", "test"):
        pq.write_table(pa.table({"image": stored, "label": [0, 1, 0, 1, 0]}), tmp_path / f"{name}.parquet")
    source = opened(tmp_path)
    np.testing.assert_array_equal(pixels_of(source, "train", [0, 1, 2]), pixels)
    for row, name in ((3, "images/lost.png"), (4, "train.parquet#0:4")):
        with pytest.raises(BadImage, match=f"{name}: missing or empty file"):
            decode(source.read("train", [row])[0])
    before = source.identity("train")
    (tmp_path / "images" / "2.png").write_bytes(images[0])
    assert opened(tmp_path).identity("train") != before


def test_structs_of_paths_alone(tmp_path: Path, noise) -> None:
    pixels, images = noise(2)
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(image)
    table = pa.table({"image": [{"path": "0.png"}, {"path": "1.png"}], "label": [0, 1]})
    for name in ("train", "test"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    np.testing.assert_array_equal(pixels_of(opened(tmp_path), "test", [1, 0]), pixels[::-1])


def test_a_column_split_of_files_that_are_named_after_splits_is_another_one(tmp_path: Path, noise) -> None:
    for name in ("train-0", "test-0"):
        table = flat(noise(3)[1], [0, 1, 2], split=["fold0", "fold1", "train"])
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert opened(tmp_path).labels("train").tolist() == opened(tmp_path).labels("test").tolist() == [0, 1, 2]


def test_a_split_of_another_name(tmp_path: Path, noise) -> None:
    for name in ("train", "validation"):
        pq.write_table(flat(noise(2)[1], [0, 1]), tmp_path / f"{name}-0.parquet")
    assert opened(tmp_path).labels("train").tolist() == [0, 1]
    with pytest.raises(SourceUnavailable, match=r"no 'test' for the test split in .*, which has train-0\.p"):
        opened(tmp_path).labels("test")
    assert opened(tmp_path, test="validation").labels("test").tolist() == [0, 1]


def test_names_of_classes_that_the_hugging_face_library_writes(tmp_path: Path, noise) -> None:
    features = {"label": {"names": ["crow", "owl"], "_type": "ClassLabel"}}
    written = {"huggingface": json.dumps({"info": {"features": features}})}
    for name in ("train", "test"):
        table = flat(noise(2)[1], [0, 1]).replace_schema_metadata(written)
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert opened(tmp_path).class_names() == ("crow", "owl")


def test_a_map_of_labels(tmp_path: Path, noise) -> None:
    for name, labels in (("train", [9203, 17, 17]), ("test", [17, 9203, 5])):
        pq.write_table(flat(noise(3)[1], labels), tmp_path / f"{name}.parquet")
    source = opened(tmp_path, label_map={"17": "crow", "9203": "owl"})
    assert source.labels("train").tolist() == [1, 0, 0]
    assert source.class_names() == ("crow", "owl")
    (row,) = check_rows(source, FLOWERS, "test")
    assert (row.index, row.reason) == (2, "label 5 is not in label_map")
    compact = opened(tmp_path, label_map="compact")
    assert compact.labels("test").tolist() == [1, 2, 0]
    assert compact.class_names() == ("5", "17", "9203")
    assert len({source.identity("train"), compact.identity("train"), opened(tmp_path).identity("train")}) == 3
    assert opened(tmp_path, label_map={"9203": "owl", "17": "crow"}).labels("train").tolist() == [0, 1, 1]
    for wrong in ("yes", {"17": "crow"}, {"17": "crow", "owl": "9203"}):
        with pytest.raises(UserError, match="label_map: expected"):
            opened(tmp_path, label_map=wrong)


@pytest.mark.parametrize("make", [flat, struct])
def test_row_groups_too_large_to_keep_are_passed_through(
    make, tmp_path: Path, noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, images = noise(40)
    for name in ("train", "test"):
        pq.write_table(make(images, list(range(40))), tmp_path / f"{name}.parquet", row_group_size=25)
    monkeypatch.setattr(parquet, "_LARGEST_KEPT_GROUP", 0)
    monkeypatch.setattr(parquet, "_image_column", None)
    chosen = [39, 3, 24, 25, 3]
    np.testing.assert_array_equal(pixels_of(opened(tmp_path), "train", chosen), pixels[chosen])
