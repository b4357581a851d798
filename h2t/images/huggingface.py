"""A data set as ``save_to_disk`` of the library ``datasets`` leaves it: Arrow files and their state."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow.fs import FileSystem, FileType, LocalFileSystem

from h2t.errors import UserError, unknown
from h2t.images.columns import find_column
from h2t.images.held_out import HeldOut
from h2t.images.identity import content_identity
from h2t.images.lossy import describe_encoding
from h2t.images.remote import open_root, read_text, require_root
from h2t.images.source import EncodedImage, FileSource, Image, RowProblem, SourceSplit, SourceUnavailable
from h2t.tasks import Task

_LAYOUT = "a folder that `save_to_disk` of the library datasets has written"
STATE, SPLITS = "state.json", "dataset_dict.json"
_COLUMNS = {"image": ("image", "img", "image_bytes"), "label": ("label", "labels", "fine_label", "cls")}


@dataclass(frozen=True)
class SavedDatasetSource(FileSource):
    """Rows in their order, after a selection or shuffling that was saved with them.

    A data set without splits is cut: a share of each class is chosen for testing.
    """

    root: str
    folder: str  # within the root's file system
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
        """Image bytes as stored."""
        listed = _rows(self, split)
        column = listed.table[_column(self, listed.table, "image")]
        stored = [column[int(listed.place[row])].as_py() or {} for row in rows]
        return [
            EncodedImage(value.get("bytes") or b"", self.name(split, row))
            for row, value in zip(rows, stored, strict=True)
        ]

    def name(self, split: SourceSplit, row: int) -> str:
        """The split's folder and the row as stored."""
        listed = _rows(self, split)
        return f"{listed.folder}#{listed.place[row]}"

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Rows without a label."""
        for row in np.flatnonzero(self.labels(split) < 0).tolist():
            yield RowProblem(row, self.name(split, row), "no label, or one that is negative")

    def class_names(self) -> tuple[str, ...]:
        """The names that the library has written."""
        table = _rows(self, "train").table
        label = _column(self, table, "label")
        written = (table.schema.metadata or {}).get(b"huggingface", b"{}")
        try:
            names = json.loads(written)["info"]["features"][label]["names"]
        except (ValueError, KeyError, TypeError):
            return ()
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def provenance(self) -> dict[str, str]:
        """The folder, and how the test images were chosen."""
        first = self.read("train", [0]) if len(self.labels("train")) else []
        data = b"".join(image.data for image in first if isinstance(image, EncodedImage))
        return {
            "source": "huggingface",
            "root": self.root,
            "encoding": describe_encoding(data, self.task),
            "rows": str(self.held_out) if _splits(self) is None else f"{self.train}/ and {self.test}/",
            "licence": self.task.licence,
        }

    def identity(self, split: SourceSplit) -> str:
        """The content of the Arrow files of a split, and which rows are taken."""
        listed = _rows(self, split)
        filesystem = open_root(self.root)[0]
        files = [f"{listed.folder}/{name}" for name in _files(filesystem, listed.folder)]
        return content_identity(filesystem, self.folder, files, listed.labels, listed.place.tolist())


def open_huggingface(
    task: Task,
    root: str | None,
    *,
    image: str = "",
    label: str = "",
    test_fraction: float = 0.2,
    seed: int = 0,
    train: str = "train",
    test: str = "test",
) -> SavedDatasetSource:
    """A task's images in a data set that the library ``datasets`` has saved.

    Args:
        image: column of images; "" = the first of the usual names.
        label: integer column.
        test_fraction: share of each class that is kept for testing where there are no splits.
        seed: of that choice.
        train: name of the training split.
        test: likewise of the test split.

    Raises:
        SourceUnavailable: nothing there, or no such data set.
        UserError: a split or column that is not there.
    """
    held_out = HeldOut(test_fraction, seed)
    root = require_root(root, task, _LAYOUT)
    filesystem, folder = open_root(root)
    if not is_saved_dataset(filesystem, folder):
        raise SourceUnavailable(f"no {STATE} or {SPLITS} in {folder}: expected {_LAYOUT}")
    source = SavedDatasetSource(root, folder, task, image, label, held_out, train, test)
    _rows(source, "train")
    return source


def is_saved_dataset(filesystem: FileSystem, folder: str) -> bool:
    """Whether a folder is one that the library has written."""
    infos = filesystem.get_file_info([f"{folder}/{STATE}", f"{folder}/{SPLITS}"])
    return any(info.type == FileType.File for info in infos)


@dataclass(frozen=True)
class _Rows:
    """``place`` int64 [n]: the rows of the table, in order; ``labels`` int32 [n]."""

    folder: str
    table: pa.Table
    place: np.ndarray
    labels: np.ndarray


def _splits(source: SavedDatasetSource) -> list[str] | None:
    text = read_text(open_root(source.root)[0], f"{source.folder}/{SPLITS}")
    return None if text is None else list(json.loads(text)["splits"])


@lru_cache(maxsize=16)
def _rows(source: SavedDatasetSource, split: SourceSplit) -> _Rows:
    splits, folder = _splits(source), source.folder
    if splits is not None:
        name = getattr(source, split)
        if name not in splits:
            raise unknown(f"split of {source.folder}", name, splits)
        folder = f"{source.folder}/{name}"
    filesystem = open_root(source.root)[0]
    state = _state(filesystem, folder)
    table = _read(filesystem, folder, [file["filename"] for file in state["_data_files"]])
    place = np.arange(table.num_rows)
    if indices := state.get("_indices_files"):
        chosen = _read(filesystem, folder, [file["filename"] for file in indices])
        place = chosen["indices"].to_numpy().astype(np.int64)
    column = table[_column(source, table, "label")]
    if not pa.types.is_integer(column.type):
        raise UserError(f"the labels of {folder} are {column.type}: expected whole numbers")
    stored = column.cast(pa.int64()).fill_null(-1).to_numpy()[place]
    labels = np.where((stored < 0) | (stored > np.iinfo(np.int32).max), -1, stored).astype(np.int32)
    if splits is None:
        part = source.held_out.rows(labels, split)
        place, labels = place[part], labels[part]
    return _Rows(folder, table, place, labels)


def _state(filesystem: FileSystem, folder: str) -> dict[str, Any]:
    text = read_text(filesystem, f"{folder}/{STATE}")
    try:
        state = json.loads(text or "")
        assert isinstance(state["_data_files"], list)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{folder}/{STATE} is not there or damaged: expected {_LAYOUT}") from error
    return state


def _files(filesystem: FileSystem, folder: str) -> list[str]:
    state = _state(filesystem, folder)
    return [file["filename"] for file in [*state["_data_files"], *(state.get("_indices_files") or [])]]


def _read(filesystem: FileSystem, folder: str, names: Sequence[str]) -> pa.Table:
    """The rows of Arrow files; local ones stay on disk, mapped into memory."""
    tables = []
    for name in names:
        path = f"{folder}/{posixpath.basename(name)}"
        try:
            local = isinstance(filesystem, LocalFileSystem)
            file = pa.memory_map(path) if local else filesystem.open_input_file(path)
            tables.append(pa.ipc.open_stream(file).read_all())
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} cannot be read as Arrow: {error}") from error
    return pa.concat_tables(tables)


def _column(source: SavedDatasetSource, table: pa.Table, option: Literal["image", "label"]) -> str:
    stated = getattr(source, option)
    return find_column(table.column_names, source.folder, stated, _COLUMNS[option], option)
