"""Parquet files of image bytes and integer labels, as data set hubs and ``h2t prepare`` write them."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileType

from h2t.errors import UserError, unknown
from h2t.images.identity import content_identity
from h2t.images.lossy import describe_encoding
from h2t.images.remote import (
    no_such_split,
    of_split,
    open_root,
    read_files,
    require_root,
    shards,
    task_folder,
)
from h2t.images.source import EncodedImage, FileSource, Image, RowProblem, SourceSplit, SourceUnavailable
from h2t.parquet_bounds import check_expansion
from h2t.tasks import Task

_LAYOUT = "a Parquet file with a column 'split', or a folder with files named after train and test"
# Looked for in this order where the recipe names no column.
_IMAGE_COLUMNS = ("image", "image_bytes", "img", "webp", "png", "jpg", "jpeg")
_LABEL_COLUMNS = ("label", "cls", "labels", "fine_label")
DATASET = "h2t.dataset"
"""The metadata entry that names the data set which the images were prepared from, with its version."""

_LARGEST_KEPT_GROUP = 64 * 2**20  # bytes
_ROWS_AT_ONCE = 8
_BUFFER = 2**20
_INDEX_COLUMN, _SPLIT_COLUMN = "index", "split"


@dataclass(frozen=True)
class ParquetSource(FileSource):
    """Rows in the order of an integer column ``index`` where there is one, else as in the files, by name."""

    root: str
    folder: str  # the folder, or the one file, within the root's file system
    task: Task
    image: str = ""  # column; "" = the first of the usual names
    label: str = ""
    train: str = "train"  # the splits' names in file names or in the column 'split'
    test: str = "test"

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [n], -1 where the label is null or negative or too large for int32."""
        return _rows(self, split).labels

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Image bytes as stored; keeps row groups that are small, and passes through large ones.

        Raises UserError for rows that are not there, such as on a node that does not share the folder.
        """
        listed = _rows(self, split)
        chosen = np.asarray(rows, dtype=np.int64)
        if chosen.max(initial=-1) >= len(listed.labels):
            raise UserError(
                f"{self.task.name}: expected at least {chosen.max() + 1} rows of '{split}' in {self.folder}, "
                f"found {len(listed.labels)}; every node must see the same files"
            )
        images: list[Image] = [EncodedImage(b"", "")] * len(chosen)
        place = np.stack([listed.file[chosen], listed.group[chosen]], axis=1)
        for file, group in np.unique(place, axis=0):
            positions = np.flatnonzero((place == (file, group)).all(axis=1))
            wanted = listed.row[chosen[positions]]
            stored = _stored_images(self, listed.files[file], int(group), wanted)
            for position, row in zip(positions, wanted.tolist(), strict=True):
                images[position] = self._image(stored[row], listed, int(chosen[position]))
        return images

    def _image(self, stored: bytes | dict[str, Any] | None, listed: "_Listed", row: int) -> EncodedImage:
        return _encoded(self.root, listed.files[listed.file[row]], stored, listed.name(row))

    def name(self, split: SourceSplit, row: int) -> str:
        """File, row group and row."""
        return _rows(self, split).name(row)

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Labels and indices that are null, and indices that occur twice."""
        listed = _rows(self, split)
        for row in np.flatnonzero(listed.labels < 0).tolist():
            yield RowProblem(row, listed.name(row), "no label, or one that is negative or over 2^31")
        for row in np.flatnonzero(listed.index < 0).tolist():
            yield RowProblem(row, listed.name(row), "no index, or one that is negative")
        for row in (np.flatnonzero(np.diff(listed.index) == 0) + 1).tolist():
            yield RowProblem(row, listed.name(row), f"index {listed.index[row]} occurs twice")

    def identity(self, split: SourceSplit) -> str:
        """The content of the files that hold the split, and which column holds the images."""
        listed = _rows(self, split)
        used = [listed.files[file] for file in np.unique(listed.file)]
        used += [path for file in used for path in _paths_beside(self, file)]
        options = (self.image, _name(self, split))
        return content_identity(open_root(self.root)[0], self.folder, used, listed.labels, *options)

    def class_names(self) -> tuple[str, ...]:
        """Those that the Hugging Face library writes into the files it makes; else none."""
        return _class_names(self)

    def provenance(self) -> dict[str, str]:
        """Root, encoding of the first image, and the data set's version where ``h2t prepare`` wrote it."""
        first = self.read("train", range(min(1, len(self.labels("train")))))
        data = b"".join(image.data for image in first if isinstance(image, EncodedImage))
        described = {
            "source": "parquet",
            "root": self.root,
            "encoding": describe_encoding(data, self.task),
            "licence": self.task.licence,
        }
        with _reading(self.root, _files_of(self, "train")[0]) as file:
            written = (file.schema_arrow.metadata or {}).get(DATASET.encode())
        return described | ({"dataset": written.decode()} if written else {})


def open_parquet(
    task: Task,
    root: str | None,
    *,
    image: str = "",
    label: str = "",
    train: str = "train",
    test: str = "test",
) -> ParquetSource:
    """A task's images in a Parquet file, in a folder of them, or in a sub-folder of the task's name.

    Args:
        image: column of images: their bytes (binary), or a struct with fields ``bytes`` and ``path``, of
            which the path counts where there are no bytes, relative to the file that names it.
        label: integer column.
        train: name of the training split in file names or in the column ``split``.
        test: likewise for the test split.

    Raises:
        SourceUnavailable: nothing there; later, when they are listed, for a split without files.
    """
    root = require_root(root, task, _LAYOUT, may_be_file=True)
    filesystem, path = open_root(root)
    if filesystem.get_file_info(path).type == FileType.File:
        return ParquetSource(root, path, task, image, label, train, test)
    folder = task_folder(root, task) or path
    if not shards(filesystem, folder, ".parquet", (train, test)):
        raise SourceUnavailable(f"no Parquet files of {task.name} in {folder}: expected {_LAYOUT}")
    return ParquetSource(root, folder, task, image, label, train, test)


@dataclass(frozen=True)
class _Listed:
    """The rows of a split, column by column; ``row`` counts within row group ``group`` of ``file``."""

    files: tuple[str, ...]
    file: np.ndarray
    group: np.ndarray
    row: np.ndarray
    index: np.ndarray
    labels: np.ndarray

    def name(self, row: int) -> str:
        """File, row group and row, for messages."""
        return f"{self.files[self.file[row]]}#{self.group[row]}:{self.row[row]}"


@lru_cache(maxsize=32)
def _rows(source: ParquetSource, split: SourceSplit) -> _Listed:
    files = _files_of(source, split)
    parts = [_rows_of_file(source, path, split) for path in files]
    file = np.repeat(np.arange(len(parts)), [len(part["labels"]) for part in parts])
    columns = {name: _joined([part[name] for part in parts]) for name in ("group", "row", "labels")}
    indexed = bool(parts) and all("index" in part for part in parts)
    index = _joined([part["index"] for part in parts]) if indexed else np.arange(len(file))
    order = np.argsort(index, kind="stable")
    return _Listed(
        tuple(files), file[order], columns["group"][order], columns["row"][order], index[order],
        columns["labels"][order].astype(np.int32),
    )  # fmt: skip


def _files_of(source: ParquetSource, split: SourceSplit) -> list[str]:
    filesystem, _ = open_root(source.root)
    if filesystem.get_file_info(source.folder).type == FileType.File:
        return [source.folder]
    paths = shards(filesystem, source.folder, ".parquet", (source.train, source.test))
    named = {name: of_split(paths, source.folder, name) for name in (source.train, source.test)}
    # Where no file is named after a split, every file may hold rows of both, told apart by a column.
    if not any(named.values()):
        return paths
    if not named[_name(source, split)]:
        raise no_such_split(paths, source.folder, split, _name(source, split))
    return named[_name(source, split)]


def _name(source: ParquetSource, split: SourceSplit) -> str:
    return source.train if split == "train" else source.test


def _rows_of_file(source: ParquetSource, path: str, split: SourceSplit) -> dict[str, np.ndarray]:
    """Columns group, row, labels and, where the file has it, index; of the rows of the split."""
    with _reading(source.root, path) as file:
        check_expansion(file.metadata, path)
        names = file.schema_arrow.names
        label = _label_column(file.schema_arrow, path, source.label)
        _image_field(file.schema_arrow, path, source.image)  # to be told now, not by a worker later
        table = file.read([label, *(name for name in (_INDEX_COLUMN, _SPLIT_COLUMN) if name in names)])
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    columns = {
        "group": np.repeat(np.arange(len(sizes)), sizes),
        "row": _joined([np.arange(size) for size in sizes]),
        "labels": _labels_or_minus_one(table.column(label)),
    }
    # A column of that name that holds something else, such as a name, does not number the rows.
    if _INDEX_COLUMN in names and pa.types.is_integer(table.schema.field(_INDEX_COLUMN).type):
        columns["index"] = table.column(_INDEX_COLUMN).cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
    named = [name for name in (source.train, source.test) if of_split([path], source.folder, name)]
    if named == [_name(source, split)]:
        return columns  # a column 'split' of such a file means something else, such as folds
    if _SPLIT_COLUMN in names:
        wanted = np.array(table.column(_SPLIT_COLUMN).to_pylist(), dtype=object) == _name(source, split)
        return {name: column[wanted] for name, column in columns.items()}
    # Without either, every row would be for training and for testing.
    raise UserError(
        f"{path} is not named after one split and has no column '{_SPLIT_COLUMN}': expected {_LAYOUT}"
    )


def _labels_or_minus_one(column: pa.ChunkedArray) -> np.ndarray:
    """int64 [n]; what int32 cannot hold becomes -1, so that it is reported and not wrapped around."""
    labels = column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
    return np.where((labels < 0) | (labels > np.iinfo(np.int32).max), -1, labels)


def _label_column(schema: pa.Schema, path: str, stated: str) -> str:
    name = _column(schema, path, stated, _LABEL_COLUMNS, "label")
    if not pa.types.is_integer(schema.field(name).type):
        raise UserError(f"labels must be integers: column '{name}' of {path} is {schema.field(name).type}")
    return name


def _column(schema: pa.Schema, path: str, stated: str, usual: Sequence[str], what: str) -> str:
    if stated and stated not in schema.names:
        raise unknown(f"{what} column of {path}", stated, schema.names)
    name = stated or next((column for column in usual if column in schema.names), "")
    if not name:
        raise UserError(
            f"no {what} column in {path}: expected one of {', '.join(usual)}, or its name in the option "
            f"'{what}'; the file has {', '.join(schema.names)}"
        )
    return name


def _stored_images(source: ParquetSource, path: str, group: int, rows: np.ndarray) -> dict[int, Any]:
    """Some rows of a row group: bytes, or a dictionary of ``bytes`` and ``path`` or one of them."""
    if _size_of_images(source, path, group) > _LARGEST_KEPT_GROUP:
        return _passing_through(source, path, group, set(rows.tolist()))
    column = _image_column(source, path, group)
    return {row: column[row].as_py() for row in rows.tolist()}


@lru_cache(maxsize=4096)
def _size_of_images(source: ParquetSource, path: str, group: int) -> int:
    """Bytes of the images of a row group."""
    with _reading(source.root, path) as file:
        name, _ = _image_columns(source, file, path)
        chunks = map(file.metadata.row_group(group).column, range(file.metadata.num_columns))
        return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == name)


def _passing_through(source: ParquetSource, path: str, group: int, rows: set[int]) -> dict[int, Any]:
    """Some rows of a row group of which a few are in memory at once: photographs make one of gigabytes."""
    found: dict[int, Any] = {}
    first = 0
    with _reading(source.root, path) as file:
        name, columns = _image_columns(source, file, path)
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
            values = batch.column(batch.schema.get_field_index(name))
            found |= {row: values[row - first].as_py() for row in rows if first <= row < first + len(values)}
            first += len(values)
            if len(found) == len(rows):
                break
    return found


# A shard's rows mostly sit in one row group, and the next shard's in the same one or the next.
@lru_cache(maxsize=2)
def _image_column(source: ParquetSource, path: str, group: int) -> pa.ChunkedArray:
    """Images of a row group: binary [n], or struct [n] with fields ``bytes`` and ``path`` or one of them."""
    with _reading(source.root, path) as file:
        name, columns = _image_columns(source, file, path)
        return file.read_row_group(group, columns).column(name)


def _image_columns(source: ParquetSource, file: pq.ParquetFile, path: str) -> tuple[str, list[str]]:
    """The name of the column of images, and what of it is read."""
    field = _image_field(file.schema_arrow, path, source.image)
    return field.name, [field.name] if _is_bytes(field.type) else _columns_of_struct(field)


def _columns_of_struct(field: pa.Field) -> list[str]:
    return [f"{field.name}.{name}" for name in ("bytes", "path") if field.type.get_field_index(name) >= 0]


def _paths_beside(source: ParquetSource, path: str) -> list[str]:
    """The files that rows without bytes name."""
    with _reading(source.root, path) as file:
        field = _image_field(file.schema_arrow, path, source.image)
        if _is_bytes(field.type) or field.type.get_field_index("path") < 0:
            return []
        if not _lacks_bytes(file, f"{field.name}.bytes"):
            return []
        rows = file.read(_columns_of_struct(field)).column(field.name).to_pylist()
    found = (_beside(path, row["path"]) for row in rows if row and not row.get("bytes"))
    return [name for name in found if name]


def _lacks_bytes(file: pq.ParquetFile, column: str) -> bool:
    """Whether some row may lack bytes, by the statistics of the file."""
    for group in range(file.metadata.num_row_groups):
        chunks = map(file.metadata.row_group(group).column, range(file.metadata.num_columns))
        counted = [chunk.statistics for chunk in chunks if chunk.path_in_schema == column]
        if not counted or counted[0] is None or counted[0].null_count != 0:
            return True
    return False


def _beside(file: str, path: str | None) -> str:
    """A path relative to the folder of a file; empty for none."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(file), path)) if path else ""


@lru_cache(maxsize=32)
def _class_names(source: ParquetSource) -> tuple[str, ...]:
    with _reading(source.root, _files_of(source, "train")[0]) as file:
        written = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        label = _label_column(file.schema_arrow, source.folder, source.label)
    try:
        names = json.loads(written)["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _image_field(schema: pa.Schema, path: str, stated: str) -> pa.Field:
    """The column of images: binary, or a struct with fields ``bytes`` and ``path`` or one of them."""
    field = schema.field(_column(schema, path, stated, _IMAGE_COLUMNS, "image"))
    if _is_bytes(field.type) or (pa.types.is_struct(field.type) and _columns_of_struct(field)):
        return field
    raise UserError(
        f"column '{field.name}' of {path} is {field.type}: expected binary, or a struct with a field 'bytes' "
        "or 'path'"
    )


def _is_bytes(type: pa.DataType) -> bool:
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type)


@contextmanager
def _reading(root: str, path: str) -> Iterator[pq.ParquetFile]:
    """The opened file; what pyarrow raises on a damaged one, here or while it is read, is a UserError."""
    try:
        # With a buffer, or a whole column of a row group would be in memory at once.
        with pq.ParquetFile(open_root(root)[0].open_input_file(path), buffer_size=_BUFFER) as file:
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def image_column(root: str, path: str) -> tuple[str, int]:
    """The column of images of a Parquet file, and the number of rows. Raises UserError where it has none."""
    with _reading(root, path) as file:
        check_expansion(file.metadata, path)
        return _image_field(file.schema_arrow, path, "").name, file.metadata.num_rows


def has_images(root: str, path: str) -> bool:
    """Whether a Parquet file has a column of images. Raises UserError for another file."""
    with _reading(root, path) as file:
        try:
            _image_field(file.schema_arrow, path, "")
        except UserError:
            return False
    return True


def stream_images(root: str, path: str) -> Iterator[EncodedImage]:
    """The images of a Parquet file in order, a few rows in memory at a time; paths count where no bytes are.

    Raises UserError for a file that cannot be read or has no column of images.
    """
    row = 0
    with _reading(root, path) as file:
        field = _image_field(file.schema_arrow, path, "")
        columns = [field.name] if _is_bytes(field.type) else _columns_of_struct(field)
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
            for stored in batch.column(0).to_pylist():
                yield _encoded(root, path, stored, f"{path}#{row}")
                row += 1


def _encoded(root: str, file: str, stored: bytes | dict[str, Any] | None, name: str) -> EncodedImage:
    """Bytes as they stand in the file, or of the file beside it that the row names instead."""
    if not isinstance(stored, dict):
        return EncodedImage(stored or b"", name)
    path = _beside(file, stored.get("path"))
    if stored.get("bytes") or not path:
        return EncodedImage(stored.get("bytes") or b"", name)
    (data,) = read_files(open_root(root)[0], [path])
    return EncodedImage(data, path)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
