"""A table of image files and labels: CSV or Parquet, with the paths of the images in a column."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow.fs import FileType

from h2t.errors import UserError, unknown
from h2t.images.columns import find_column
from h2t.images.held_out import HeldOut
from h2t.images.identity import content_identity
from h2t.images.lossy import describe_encoding
from h2t.images.remote import natural_order, open_root, read_files, require_root
from h2t.images.source import EncodedImage, FileSource, Image, RowProblem, SourceSplit, SourceUnavailable
from h2t.parquet_bounds import check_expansion
from h2t.tasks import Task

_LAYOUT = "a .csv or .parquet file with a column of paths, relative to it, and a column of labels"
_PATH_COLUMNS = ("path", "image_path", "file", "file_name", "filename", "image")
_LABEL_COLUMNS = ("label", "class", "category", "target")
_LARGEST_LABEL = np.iinfo(np.int32).max


@dataclass(frozen=True)
class TableSource(FileSource):
    """Rows in the order of the table. Labels that are text are the places of the names in natural order.

    A column ``split`` says which rows are for training and testing; without it, a share of each class is
    chosen for testing.
    """

    root: str
    file: str  # within the root's file system
    task: Task
    image: str
    label: str
    held_out: HeldOut
    train: str
    test: str

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [n], -1 where there is none."""
        return _rows(self, split).labels

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Files as stored, of any format."""
        paths = [self.name(split, row) for row in rows]
        data = read_files(open_root(self.root)[0], paths)
        return [EncodedImage(content, path) for content, path in zip(data, paths, strict=True)]

    def name(self, split: SourceSplit, row: int) -> str:
        """The path of the image."""
        return _rows(self, split).paths[row]

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Rows without a label, and files that are not there."""
        rows = _rows(self, split)
        for row in np.flatnonzero(rows.labels < 0).tolist():
            yield RowProblem(row, rows.paths[row], "no label, or a number that is negative or over 2^31")
        infos = open_root(self.root)[0].get_file_info(list(rows.paths))
        for row, info in enumerate(infos):
            if info.type != FileType.File:
                yield RowProblem(row, info.path, f"named in {self.file}, but not there")

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order, where the labels are text."""
        return _table(self).names

    def provenance(self) -> dict[str, str]:
        """The file, and how the test images were chosen."""
        first = read_files(open_root(self.root)[0], _rows(self, "train").paths[:1])
        return {
            "source": "table",
            "root": self.root,
            "encoding": describe_encoding(b"".join(first), self.task),
            "rows": str(self.held_out) if _table(self).split is None else "column split",
            "licence": self.task.licence,
        }

    def identity(self, split: SourceSplit) -> str:
        """The content of the images of a split, and their labels."""
        rows, folder = _rows(self, split), posixpath.dirname(self.file)
        return content_identity(open_root(self.root)[0], folder, rows.paths, rows.labels, self.class_names())


def open_table(
    task: Task,
    root: str | None,
    *,
    image: str = "",
    label: str = "",
    test_fraction: float = 0.2,
    seed: int = 0,
    train: str = "train",
    test: str = "test",
) -> TableSource:
    """A task's images by a table of their paths and labels.

    Args:
        image: column of paths, relative to the table's folder or absolute; "" = the first of the usual names.
        label: column of whole numbers from 0, or of names.
        test_fraction: share of each class that is kept for testing where there is no column ``split``.
        seed: of that choice.
        train: what the column ``split`` says of training images.
        test: likewise of test images.

    Raises:
        SourceUnavailable: nothing there.
        UserError: a file that is no table, a column that is not there, a share outside (0, 1), and labels
            that are neither whole numbers nor text.
    """
    held_out = HeldOut(test_fraction, seed)
    root = require_root(root, task, _LAYOUT, may_be_file=True)
    filesystem, path = open_root(root)
    if filesystem.get_file_info(path).type != FileType.File:
        raise SourceUnavailable(f"the images of {task.name}: {root} is a folder, expected {_LAYOUT}")
    source = TableSource(root, path, task, image, label, held_out, train, test)
    _rows(source, "train")
    return source


@dataclass(frozen=True)
class _Table:
    paths: tuple[str, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    split: np.ndarray | None


@dataclass(frozen=True)
class _Rows:
    paths: tuple[str, ...]
    labels: np.ndarray


@lru_cache(maxsize=64)
def _rows(source: TableSource, split: SourceSplit) -> _Rows:
    table = _table(source)
    if table.split is None:
        chosen = source.held_out.rows(table.labels, split)
    else:
        wanted = getattr(source, split)
        chosen = np.flatnonzero(table.split == wanted)
        if not len(chosen):
            raise unknown(f"split of {source.file}", wanted, sorted(set(table.split.tolist())))
    return _Rows(tuple(table.paths[row] for row in chosen), table.labels[chosen])


@lru_cache(maxsize=32)
def _table(source: TableSource) -> _Table:
    filesystem, _ = open_root(source.root)
    try:
        with filesystem.open_input_file(source.file) as file:
            table = (
                _read_parquet(file, source.file)
                if source.file.lower().endswith(".parquet")
                else pyarrow.csv.read_csv(file)
            )
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{source.file} cannot be read as a table: {error}; expected {_LAYOUT}") from error
    names = table.column_names
    image = find_column(names, source.file, source.image, _PATH_COLUMNS, "image")
    label = find_column(names, source.file, source.label, _LABEL_COLUMNS, "label")
    folder = posixpath.dirname(source.file)
    paths = tuple(posixpath.join(folder, str(path or "")) for path in table[image].to_pylist())
    labels, classes = _labels(table[label], f"column '{label}' of {source.file}")
    split = np.array(table["split"].to_pylist(), object) if "split" in names else None
    return _Table(paths, labels, classes, split)


def _read_parquet(file: pa.NativeFile, name: str) -> pa.Table:
    with pq.ParquetFile(file) as opened:
        check_expansion(opened.metadata, name)
        return opened.read()


def _labels(column: pa.ChunkedArray, origin: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """int32 [n], -1 where there is none; and the names of the classes, of labels that are text."""
    values = column.to_pylist()
    if pa.types.is_integer(column.type):
        usable = (value if value is not None and 0 <= value <= _LARGEST_LABEL else -1 for value in values)
        return np.fromiter(usable, np.int32, len(values)), ()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        names = tuple(sorted({value for value in values if value}, key=natural_order))
        place = {name: number for number, name in enumerate(names)}
        return np.fromiter((place.get(value, -1) for value in values), np.int32, len(values)), names
    raise UserError(f"{origin} is {column.type}: expected whole numbers or names")
