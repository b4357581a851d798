"""VTAB's label rules and splits, on made-up records of each data set's schema."""

import importlib.util
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from h2t.errors import UserError
from h2t.images import prepare_vtab
from h2t.images.formats import open_source
from h2t.images.prepare_vtab import (
    RULES,
    clevr_count,
    clevr_distance,
    dsprites_location,
    dsprites_orientation,
    kitti_distance,
    lossless,
    open_records,
    prepare_task,
    resolve_split,
)
from h2t.images.preprocessing import decode
from h2t.images.source import SourceUnavailable
from h2t.tasks import VTAB_1K, find_task

TENSORFLOW = importlib.util.find_spec("tensorflow") is not None

# Sizes of the splits that TensorFlow Datasets has, by data set.
SIZES = {
    "cifar100": {"train": 50_000, "test": 10_000},
    "caltech101": {"train": 3_060, "test": 6_084},
    "dtd": {"train": 1_880, "validation": 1_880, "test": 1_880},
    "oxford_flowers102": {"train": 1_020, "validation": 1_020, "test": 6_149},
    "oxford_iiit_pet": {"train": 3_680, "test": 3_669},
    "svhn_cropped": {"train": 73_257, "test": 26_032},
    "sun397": {"train": 76_128, "validation": 10_875, "test": 21_750},
    "patch_camelyon": {"train": 262_144, "validation": 32_768, "test": 32_768},
    "eurosat": {"train": 27_000},
    "resisc45": {"train": 31_500},
    "diabetic_retinopathy_detection": {"train": 35_126, "validation": 10_906, "test": 42_670},
    "clevr": {"train": 70_000, "validation": 15_000},
    "dmlab": {"train": 65_550, "validation": 22_628, "test": 22_735},
    "kitti": {"train": 6_347, "validation": 423, "test": 711},
    "dsprites": {"train": 737_280},
    "smallnorb": {"train": 24_300, "test": 24_300},
}


# Where VTAB's 200 validation images begin, in which split; its training set is the first 800 of ``train``.
VALIDATION = {
    "cifar100": ("train", 45_000),
    "caltech101": ("train", 2_754),
    "dtd": ("validation", 0),
    "oxford_flowers102": ("validation", 0),
    "oxford_iiit_pet": ("train", 2_944),
    "svhn": ("train", 65_931),
    "sun397": ("validation", 0),
    "patch_camelyon": ("validation", 0),
    "eurosat": ("train", 16_200),
    "resisc45": ("train", 18_900),
    "diabetic_retinopathy": ("validation", 0),
    "clevr_count": ("train", 63_000),
    "clevr_dist": ("train", 63_000),
    "dmlab": ("validation", 0),
    "kitti": ("validation", 0),
    "dsprites_loc": ("train", 589_824),
    "dsprites_ori": ("train", 589_824),
    "smallnorb_azi": ("test", 0),
    "smallnorb_ele": ("test", 0),
}


def sizes_of(task):
    return SIZES[RULES[task.name].dataset.split(":")[0].split("/")[0]]


@pytest.mark.parametrize(
    ("name", "split", "first"),
    [
        ("clevr_count", "validation", 0),
        ("dsprites_ori", "train", 663_552),
        ("eurosat", "train", 21_600),
        ("resisc45", "train", 25_200),
        ("smallnorb_azi", "test", 12_150),
        ("svhn", "test", 0),
    ],
)
def test_where_the_test_images_are(name: str, split: str, first) -> None:
    task = find_task(name)
    assert resolve_split(RULES[name].test, sizes_of(task)) == [(split, range(first, first + task.n_test))]


@pytest.mark.parametrize("task", VTAB_1K, ids=lambda task: task.name)
def test_splits_have_vtabs_sizes_and_never_meet(task) -> None:
    rule, sizes = RULES[task.name], sizes_of(task)
    rows = {
        name: [(split, number) for split, part in resolve_split(expression, sizes) for number in part]
        for name, expression in rule.splits.items()
    }
    assert {name: len(found) for name, found in rows.items()} == {
        "train": 1000,
        "test": task.n_test,
        "first1000": 1000,
    }
    assert all(0 <= number < sizes[split] for found in rows.values() for split, number in found)
    assert not set(rows["test"]) & (set(rows["train"]) | set(rows["first1000"]))
    split, first = VALIDATION[task.name]
    assert rows["first1000"] == [("train", number) for number in range(1000)]
    assert rows["train"][:800] == rows["first1000"][:800]
    assert rows["train"][800:] == [(split, number) for number in range(first, first + 200)]


def test_every_task_has_a_recipe() -> None:
    assert list(RULES) == [task.name for task in VTAB_1K]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("train", [("train", range(0, 10))]),
        ("train[:3]+train[7:9]", [("train", range(0, 3)), ("train", range(7, 9))]),
        ("train[8:] + test[:1]", [("train", range(8, 10)), ("test", range(0, 1))]),
        ("test[50%:]", [("test", range(2, 3))]),
        ("train[10%:25%]", [("train", range(1, 2))]),
        ("test[:]", [("test", range(0, 3))]),
    ],
)
def test_split_arithmetic(expression: str, expected) -> None:
    assert resolve_split(expression, {"train": 10, "test": 3}) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("tran[:5]", "unknown split 'tran': did you mean train"),
        ("train[:11]", "'train' has 10 rows, expected at least 11"),
        ("train[5:3]", "has 10 rows"),
        ("train[a:b]", "expected a name, or name"),
        ("train++test", "expected a name"),
    ],
)
def test_impossible_splits(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_split(expression, {"train": 10, "test": 3})


def clevr(*depths):
    coordinates = np.array([[100.0, 50.0, depth] for depth in depths], dtype=np.float32)
    return {"file_name": "CLEVR_train_000000.png", "objects": {"pixel_coords": coordinates}}


@pytest.mark.parametrize(("n_objects", "label"), [(3, 0), (7, 4), (10, 7)])
def test_clevr_counts_objects_from_three(n_objects, label) -> None:
    assert clevr_count(clevr(*[9.0] * n_objects)) == label


@pytest.mark.parametrize(
    ("depth", "label"),
    [
        (7.9, 0),
        (8.0, 0),
        (8.01, 1),
        (8.5, 1),
        (8.6, 2),
        (9.0, 2),
        (9.2, 3),
        (9.5, 3),
        (9.7, 4),
        (10.0, 4),
        (12.0, 5),
    ],
)
def test_clevr_distance_is_of_the_closest_object_in_half_open_bins(depth, label) -> None:
    assert clevr_distance(clevr(13.0, depth, 12.5)) == label


def kitti(*objects):
    types = np.array([kind for kind, _ in objects], dtype=np.int64)
    locations = np.array([[1.0, 2.0, depth] for _, depth in objects], dtype=np.float32).reshape(-1, 3)
    return {"objects": {"type": types, "location": locations}}


@pytest.mark.parametrize(
    ("objects", "label"),
    [
        ([(0, 7.0)], 0),
        ([(0, 8.0)], 0),
        ([(1, 8.5), (2, 30.0)], 1),
        ([(2, 20.0)], 1),
        ([(0, 20.5)], 2),
        ([(0, 400.0)], 2),
        ([(3, 2.0), (4, 1.0), (0, 50.0)], 2),  # people closer by do not count
        ([(3, 2.0), (7, 5.0)], 3),
        ([], 3),
        ([(0, -50.0)], 0),
    ],
)
def test_kitti_distance_is_of_the_closest_vehicle(objects, label) -> None:
    assert kitti_distance(kitti(*objects)) == label


def test_dsprites_bins() -> None:
    assert [dsprites_location({"label_x_position": np.int64(x)}) for x in (0, 1, 2, 30, 31)] == [
        0,
        0,
        1,
        15,
        15,
    ]
    turns = [dsprites_orientation({"label_orientation": np.int64(turn)}) for turn in range(40)]
    assert np.bincount(turns).tolist() == [3, 2] * 8


def test_smallnorb_and_plain_labels_are_the_records() -> None:
    record = {"label": 3, "label_azimuth": 17, "label_elevation": 8, "label_category": 1}
    assert RULES["smallnorb_azi"].label(record) == 17
    assert RULES["smallnorb_ele"].label(record) == 8
    assert RULES["svhn"].label(record) == 3


def test_stored_bytes_stay_and_pixels_become_png(random_pixels, encode) -> None:
    jpeg = encode(random_pixels(), "JPEG")
    assert lossless(jpeg) is jpeg
    with Image.open(io.BytesIO(lossless(random_pixels()))) as image:
        np.testing.assert_array_equal(np.asarray(image), random_pixels())
    bits = np.array([[0, 1]], dtype=np.uint8)
    for stored in (bits[..., None], encode(bits)):
        with Image.open(io.BytesIO(lossless(stored, brightness=255))) as image:
            assert np.asarray(image).tolist() == [[0, 255]]


@pytest.fixture
def dsprites_records(encode):
    """The few of 737,280 records that the task reads, made when asked for."""

    class Records:
        def __len__(self):
            return 737_280

        def __getitem__(self, number):
            image = np.zeros((4, 4), dtype=np.uint8)
            image.flat[number % 16] = 1
            return {"image": encode(image), "label_x_position": number % 32, "label_orientation": number % 40}

    return {"train": Records()}


def test_prepared_task_reads_back(tmp_path: Path, dsprites_records, monkeypatch: pytest.MonkeyPatch) -> None:
    task = find_task("dsprites_loc")
    monkeypatch.setitem(RULES, task.name, _with_small_test(RULES[task.name]))
    seen = []
    destination = str(tmp_path / "prepared")
    written = prepare_task(
        task, "", destination, records=dsprites_records, progress=lambda *state: seen.append(state)
    )
    assert written == {"train": 1000, "test": 150, "first1000": 1000}
    assert seen[-1] == ("first1000", 1000, 1000)
    source = open_source("parquet", task, destination, {})
    expected = np.array([*range(800), *range(589_824, 590_024)])
    np.testing.assert_array_equal(source.labels("train"), expected % 32 // 2)
    assert len(source.labels("test")) == 150
    (image,) = source.read("train", [801])
    pixels = decode(image)
    assert pixels.shape == (4, 4, 3)
    assert pixels[..., 0].ravel().nonzero()[0].tolist() == [589_825 % 16]
    assert pixels.max() == 255
    assert source.provenance()["dataset"] == "dsprites:2.*.*"
    folds_rows = open_source("parquet", task, destination, {"train": "first1000"})
    np.testing.assert_array_equal(folds_rows.labels("train"), np.arange(1000) % 32 // 2)


def _with_small_test(rule):
    return replace(rule, test="train[663552:663702]")


def test_only_missing_files_are_written_and_a_failure_leaves_none(
    tmp_path: Path, dsprites_records, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = find_task("dsprites_ori")
    monkeypatch.setitem(RULES, task.name, _with_small_test(RULES[task.name]))

    class Failing:
        def __len__(self):
            return 737_280

        def __getitem__(self, number):
            if number == 900:
                raise OSError("disk on fire")
            return dsprites_records["train"][number]

    with pytest.raises(OSError, match="on fire"):
        prepare_task(task, "", str(tmp_path), records={"train": Failing()})
    folder = tmp_path / "dsprites_ori"
    assert sorted(path.name for path in folder.glob("*.parquet")) == ["test.parquet", "train.parquet"]
    assert prepare_task(task, "", str(tmp_path), records=dsprites_records) == {"first1000": 1000}
    assert prepare_task(task, "", str(tmp_path), records=dsprites_records) == {}
    assert pq.read_table(folder / "first1000.parquet").column("index").to_pylist() == list(range(1000))


def test_the_version_of_vtab_is_taken_where_it_can_be_had_and_the_file_says_which(
    tmp_path: Path, encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, image = find_task("kitti"), encode(np.zeros((2, 2, 3), np.uint8))
    record = {"image": image, "objects": {"type": np.array([0]), "location": np.array([[0.0, 0.0, 5.0]])}}
    available = {"kitti:3.*.*"}

    def opened(dataset: str, data_dir: str) -> dict[str, list]:
        if dataset not in available:
            raise SourceUnavailable(f"no {dataset}")
        return {"train": [record] * 1000, "validation": [record] * 200, "test": [record] * 3}

    monkeypatch.setattr(prepare_vtab, "open_records", opened)
    for expected in ("kitti:3.*.*", "kitti:3.1.0"):
        available.add(expected)
        prepare_task(task, "", str(tmp_path / expected[:9]))
        source = open_source("parquet", task, str(tmp_path / expected[:9]), {})
        assert source.provenance()["dataset"] == expected
    with pytest.raises(SourceUnavailable, match=r"no oxford_iiit_pet:4\.\*\.\*"):
        prepare_task(find_task("pets"), "", str(tmp_path))


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown VTAB-1k task 'mnist'"):
        prepare_task(find_task("mnist"), "", str(tmp_path))
    with pytest.raises(UserError, match="expected at least 16400"):
        prepare_task(find_task("eurosat"), "", str(tmp_path), records={"train": [{}] * 999})


def test_absent_tensorflow_datasets_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # A None among the modules is how Python marks one that cannot be imported.
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(SourceUnavailable, match="pip install"):
        open_records("dtd:3.*.*", "")


@pytest.mark.parametrize(
    "file_format",
    ["array_record", pytest.param("tfrecord", marks=pytest.mark.skipif(not TENSORFLOW, reason="TensorFlow"))],
)
@pytest.mark.filterwarnings("default")  # theirs
def test_the_real_tensorflow_datasets(file_format, tmp_path: Path, encode) -> None:
    """Records of CLEVR's and KITTI's schemas, written and read back by the library where it is installed."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="an optional extra")
    features = tfds.features
    data_dir = str(tmp_path)

    class Objects(tfds.core.GeneratorBasedBuilder):
        name = f"h2t_{file_format}"
        VERSION = tfds.core.Version("3.1.0")

        def _info(self):
            each = {
                "type": features.ClassLabel(num_classes=8),
                "location": features.Tensor(shape=(3,), dtype=np.float32),
                "pixel_coords": features.Tensor(shape=(3,), dtype=np.float32),
            }
            image = features.Image(shape=(None, None, 3))
            return tfds.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict({"image": image, "objects": features.Sequence(each)}),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(6):
                objects = [
                    {"type": kind, "location": [0, 0, 9 + kind], "pixel_coords": [0, 0, 8.2 + kind]}
                    for kind in range(number)
                ]
                image = io.BytesIO(encode(np.full((2, 3, 3), number, dtype=np.uint8)))
                yield number, {"image": image, "objects": objects}

    if file_format == "tfrecord":
        tfds.builder(Objects.name, data_dir=data_dir).download_and_prepare()
    train = open_records(f"{Objects.name}:3.*.*", data_dir)["train"]
    assert len(train) == 6
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(f"*.{file_format}*")}
    assert times, "new data is made in a format that is read without TensorFlow; what is there stays as it is"
    assert len(open_records(f"{Objects.name}:3.*.*", data_dir)["train"]) == 6
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob(f"*.{file_format}*")}
    found = {}
    for number in (0, 1, 2, 4, 5, 3):  # not in order: the next one, and others
        record = train[number]
        with Image.open(io.BytesIO(lossless(record["image"]))) as image:
            n_objects = int(np.asarray(image)[0, 0, 0])
        found[n_objects] = (clevr_count(record), kitti_distance(record))
        if n_objects:
            assert clevr_distance(record) == 1
    assert found == {number: (number - 3, 1 if number else 3) for number in range(6)}
