"""VTAB-1k from its origins: reads data sets with TensorFlow Datasets and writes each task once as Parquet.

The label rules and splits are those of Zhai et al. (2019), "A Large-scale Study of Representation Learning
with the Visual Task Adaptation Benchmark". TensorFlow Datasets is optional; TensorFlow itself is not needed.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PillowImage
from pyarrow.fs import FileSystem, FileType

from h2t.errors import UserError, unknown
from h2t.images.parquet import DATASET
from h2t.images.remote import open_root
from h2t.images.source import SourceUnavailable
from h2t.tasks import Task

Record = Mapping[str, Any]
"""One example as TensorFlow Datasets gives it: a dictionary, nested for sequences."""
Records = Mapping[str, Sequence[Record]]
"""The examples of each split of a data set, by position."""

_ROWS_PER_GROUP = 100
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SCHEMA = pa.schema([("index", pa.int32()), ("label", pa.int32()), ("image", _IMAGE)])

_CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
_CLEVR_FEWEST_OBJECTS = 3
_KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
_KITTI_NOTHING_NEAR = 1000.0
# Car, van and truck; the types after them are people, trams and the rest.
_KITTI_VEHICLE_TYPES = 3


def clevr_count(record: Record) -> int:
    """Number of objects, from three up: 3 to 10 objects are classes 0 to 7."""
    return len(record["objects"]["pixel_coords"]) - _CLEVR_FEWEST_OBJECTS


def clevr_distance(record: Record) -> int:
    """Bin of the depth of the closest object: beyond 8, 8.5, 9, 9.5, 10 are classes 1 to 5."""
    return _bin(np.min(np.asarray(record["objects"]["pixel_coords"])[:, 2]), _CLEVR_DISTANCES)


def kitti_distance(record: Record) -> int:
    """Bin of the distance to the closest vehicle in metres: to 8, to 20, beyond; 3 without a vehicle."""
    types, locations = np.asarray(record["objects"]["type"]), np.asarray(record["objects"]["location"])
    depths = locations.reshape(-1, 3)[types < _KITTI_VEHICLE_TYPES, 2]
    return _bin(np.min(depths, initial=_KITTI_NOTHING_NEAR), _KITTI_DISTANCES)


def dsprites_location(record: Record) -> int:
    """32 columns in 16 classes of two."""
    return int(record["label_x_position"]) // 2


def dsprites_orientation(record: Record) -> int:
    """40 orientations in 16 classes of three and two in turn."""
    return int(np.floor(int(record["label_orientation"]) / 2.5))


def stated_label(record: Record) -> int:
    """The data set's own label."""
    return int(record["label"])


def _bin(value: float, thresholds: Sequence[float]) -> int:
    """The last threshold that the value lies strictly above."""
    return int(np.searchsorted(thresholds, value, side="left")) - 1


def _field(name: str) -> Callable[[Record], int]:
    return lambda record: int(record[name])


@dataclass(frozen=True)
class VtabRule:
    """How a VTAB-1k task is made of a data set; splits and versions in TensorFlow Datasets' notation.

    ``dataset``: the version of VTAB's own code (google-research/task_adaptation), ``later`` one to take where
    that can no longer be made.
    """

    dataset: str
    train: str  # VTAB's 800 training and 200 validation images
    test: str = "test"
    label: Callable[[Record], int] = stated_label
    later: str = ""
    brightness: int = 1  # what the stored pixels are multiplied by

    @property
    def splits(self) -> dict[str, str]:
        """By file name; ``first1000`` is what the paper cross-validates on, partly other images."""
        return {"train": self.train, "test": self.test, "first1000": "train[:1000]"}


_WITH_VALIDATION = "train[:800]+validation[:200]"
_DSPRITES = ("dsprites:2.*.*", "train[:800]+train[589824:590024]", "train[663552:]")
_SMALLNORB = ("smallnorb:2.*.*", "train[:800]+test[:200]", "test[50%:]")
_CLEVR = ("clevr:3.*.*", "train[:800]+train[63000:63200]", "validation")

RULES: dict[str, VtabRule] = {
    "cifar100": VtabRule("cifar100:3.*.*", "train[:800]+train[45000:45200]"),
    "caltech101": VtabRule("caltech101:3.*.*", "train[:800]+train[2754:2954]"),
    "dtd": VtabRule("dtd:3.*.*", _WITH_VALIDATION),
    "oxford_flowers102": VtabRule("oxford_flowers102:2.*.*", _WITH_VALIDATION),
    # Version 4 has the same images in the same order, some encoded anew, and is all that new releases make.
    "oxford_iiit_pet": VtabRule(
        "oxford_iiit_pet:3.*.*", "train[:800]+train[2944:3144]", later="oxford_iiit_pet:4.*.*"
    ),
    "svhn": VtabRule("svhn_cropped:3.*.*", "train[:800]+train[65931:66131]"),
    "sun397": VtabRule("sun397/tfds:4.*.*", _WITH_VALIDATION),
    "patch_camelyon": VtabRule("patch_camelyon:2.*.*", _WITH_VALIDATION),
    "eurosat": VtabRule("eurosat/rgb:2.*.*", "train[:800]+train[16200:16400]", "train[21600:]"),
    "resisc45": VtabRule("resisc45:3.*.*", "train[:800]+train[18900:19100]", "train[25200:]"),
    "diabetic_retinopathy": VtabRule("diabetic_retinopathy_detection/btgraham-300:3.*.*", _WITH_VALIDATION),
    "clevr_count": VtabRule(*_CLEVR, label=clevr_count),
    "clevr_dist": VtabRule(*_CLEVR, label=clevr_distance),
    "dmlab": VtabRule("dmlab:2.0.1", _WITH_VALIDATION),
    # Version 3.2.0 mends boxes, which the labels do not use; 3.3.0 only names what that numbers, and is all
    # that new releases make.
    "kitti": VtabRule("kitti:3.1.0", _WITH_VALIDATION, label=kitti_distance, later="kitti:3.*.*"),
    "dsprites_loc": VtabRule(*_DSPRITES, label=dsprites_location, brightness=255),
    "dsprites_ori": VtabRule(*_DSPRITES, label=dsprites_orientation, brightness=255),
    "smallnorb_azi": VtabRule(*_SMALLNORB, label=_field("label_azimuth")),
    "smallnorb_ele": VtabRule(*_SMALLNORB, label=_field("label_elevation")),
}
"""By the name of the task."""


def resolve_split(expression: str, sizes: Mapping[str, int]) -> list[tuple[str, range]]:
    """The rows of an expression such as ``train[:800]+validation[:200]`` or ``test[50%:]``.

    Args:
        expression: splits joined by '+', each whole or with a slice of row numbers or percentages (rounded to
            the nearest row).
        sizes: number of examples of each split of the data set.

    Raises:
        UserError: not such an expression, no such split, or rows that the split does not have.
    """
    return [_resolve_part(part.strip(), sizes) for part in expression.split("+")]


def _resolve_part(part: str, sizes: Mapping[str, int]) -> tuple[str, range]:
    match = re.fullmatch(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?", part)
    if match is None:
        raise UserError(f"split '{part}': expected a name, or name[from:to] in rows or percent")
    name, start, stop = match.groups()
    if name not in sizes:
        raise unknown("split", name, sizes)
    rows = range(_boundary(start or "0", sizes[name]), _boundary(stop or "100%", sizes[name]))
    if rows.start > rows.stop or rows.stop > sizes[name]:
        raise UserError(f"split '{part}': '{name}' has {sizes[name]} rows, expected at least {rows.stop}")
    return name, rows


def _boundary(written: str, size: int) -> int:
    return round(int(written[:-1]) * size / 100) if written.endswith("%") else int(written)


def prepare_task(
    task: Task,
    data_dir: str,
    destination: str,
    *,
    records: Records | None = None,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> dict[str, int]:
    """Writes ``<destination>/<task>/{train,test,first1000}.parquet`` where missing, without loss.

    Args:
        task: one of VTAB-1k's.
        data_dir: where TensorFlow Datasets keeps its data; downloaded to where it can be.
        destination: path or URI.
        records: the data set's examples, if not to be opened from ``data_dir``.
        progress: called with split, rows done and rows in all.

    Returns:
        Number of rows of each file written now.

    Raises:
        UserError: no such task, or a data set with other splits than VTAB's.
        SourceUnavailable: TensorFlow Datasets or the data set is not there.
    """
    if task.name not in RULES:
        raise unknown("VTAB-1k task", task.name, RULES)
    rule = RULES[task.name]
    filesystem, base = open_root(destination)
    paths = {name: f"{base}/{task.name}/{name}.parquet" for name in rule.splits}
    missing = [
        name for name, path in paths.items() if filesystem.get_file_info(path).type == FileType.NotFound
    ]
    if not missing:
        return {}
    dataset = rule.dataset
    if records is None:
        dataset, records = _open_either(rule, data_dir)
    sizes = {name: len(split) for name, split in records.items()}
    resolved = {name: resolve_split(rule.splits[name], sizes) for name in missing}
    filesystem.create_dir(f"{base}/{task.name}", recursive=True)
    return {
        name: _write(_rows(rule, records, parts, partial(progress, name)), filesystem, paths[name], dataset)
        for name, parts in resolved.items()
    }


def _open_either(rule: VtabRule, data_dir: str) -> tuple[str, Records]:
    """The version that can be had, VTAB's own first, and its examples."""
    try:
        return rule.dataset, open_records(rule.dataset, data_dir)
    except SourceUnavailable:
        if not rule.later:
            raise
        return rule.later, open_records(rule.later, data_dir)


def open_records(dataset: str, data_dir: str) -> Records:
    """The examples of a data set by position, images as the bytes that are stored.

    A data set that is not in ``data_dir`` yet is made there, in a format that is read without TensorFlow; one
    that is there as TFRecord files is read with TensorFlow.

    Raises:
        SourceUnavailable: TensorFlow Datasets is not installed, or it cannot open the data set.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise SourceUnavailable(
            "reading the original data sets needs TensorFlow Datasets: pip install 'head2toe-ray[tfds]'"
        ) from error
    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
        if not builder.is_prepared():
            builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        if builder.info.file_format.value == "tfrecord":
            return {split: _TensorFlowRecords(tfds, builder, split) for split in builder.info.splits}
        return builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
    # Its builders raise as they please: no such version, a manual download, no network, a file format.
    except Exception as error:
        raise SourceUnavailable(
            f"TensorFlow Datasets cannot open {dataset} in {data_dir}: {error}"
        ) from error


class _TensorFlowRecords(Sequence[Record]):
    """A split in TFRecord files, which are read in order: fast from one example to the next one only."""

    def __init__(self, tfds: Any, builder: Any, split: str) -> None:
        self._tfds, self._builder, self._split = tfds, builder, split
        self._next, self._examples = -1, iter(())

    def __len__(self) -> int:
        return self._builder.info.splits[self._split].num_examples

    def __getitem__(self, number: Any) -> Any:
        if number != self._next:
            dataset = self._builder.as_dataset(
                split=f"{self._split}[{number}:]",
                decoders={"image": self._tfds.decode.SkipDecoding()},
                # By default it takes turns between files, which is another order than the data source's.
                read_config=self._tfds.ReadConfig(interleave_cycle_length=1),
            )
            self._examples = iter(self._tfds.as_numpy(dataset))
        self._next = number + 1
        return next(self._examples)


_Row = tuple[int, bytes, str]


def _rows(
    rule: VtabRule, records: Records, parts: Sequence[tuple[str, range]], progress: Callable[[int, int], None]
) -> Iterator[_Row]:
    """Label, encoded image and origin of each row."""
    positions = [(split, number) for split, rows in parts for number in rows]
    for done, (split, number) in enumerate(positions, 1):
        record = records[split][number]
        yield rule.label(record), lossless(record["image"], rule.brightness), f"{split}/{number}"
        progress(done, len(positions))


def lossless(image: bytes | np.ndarray, brightness: int = 1) -> bytes:
    """An image as bytes: stored ones unchanged, pixels (uint8 [h, w, 1 or 3]) or brightened ones as PNG."""
    if isinstance(image, bytes):
        if brightness == 1:
            return image
        with PillowImage.open(io.BytesIO(image)) as opened:
            image = np.asarray(opened)
    pixels = np.asarray(image, dtype=np.uint8) * np.uint8(brightness)
    written = io.BytesIO()
    PillowImage.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(written, format="PNG")
    return written.getvalue()


def _write(rows: Iterator[_Row], filesystem: FileSystem, path: str, dataset: str) -> int:
    """Writes rows to a Parquet file that appears whole or not at all; returns their number.

    The file's metadata names the data set and its version.
    """
    schema = _SCHEMA.with_metadata({DATASET: dataset})
    temporary = f"{path}.part"
    n_rows = 0
    # Images are compressed already.
    with (
        filesystem.open_output_stream(temporary) as stream,
        pq.ParquetWriter(stream, schema, compression="none") as writer,
    ):
        while group := list(islice(rows, _ROWS_PER_GROUP)):
            writer.write_table(_table(group, n_rows))
            n_rows += len(group)
    filesystem.move(temporary, path)
    return n_rows


def _table(rows: Sequence[_Row], first_index: int) -> pa.Table:
    labels, images, origins = zip(*rows, strict=True)
    image = pa.StructArray.from_arrays(
        [pa.array(images, pa.binary()), pa.array(origins)], fields=list(_IMAGE)
    )
    index = pa.array(range(first_index, first_index + len(rows)), pa.int32())
    return pa.table({"index": index, "label": pa.array(labels, pa.int32()), "image": image}, schema=_SCHEMA)
