"""The VTAB-1k archive that circulates: a folder per task with images and lists of them.

``<root>/<folder>/train800val200.txt`` (or ``train800.txt`` and ``val200.txt``) and ``test.txt`` hold lines
``images/test/000000.jpg 307``: a path below the task's folder, a space or tab, a label.
"""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
from pyarrow.fs import FileSelector, FileSystem, FileType

from h2t.images.identity import content_identity
from h2t.images.lossy import describe_encoding
from h2t.images.remote import open_root, read_files, read_text, require_root, task_folder
from h2t.images.source import EncodedImage, FileSource, Image, RowProblem, SourceSplit, SourceUnavailable
from h2t.tasks import Task

_LAYOUT = "the folder that holds cifar/, caltech101/ … of a VTAB-1k archive"
# The lists of a split: the first of these alternatives that is there is read.
_LISTS = {"train": (("train800val200.txt",), ("train800.txt", "val200.txt")), "test": (("test.txt",),)}


@dataclass(frozen=True)
class Vtab1kSource(FileSource):
    """One task of an archive; rows are the lines of its lists, in their order, blank ones left out."""

    root: str
    folder: str  # within the root's file system
    task: Task

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [n], -1 where a line is broken."""
        return _rows(self, split).labels

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Files as stored, of any format."""
        paths = [self.name(split, row) for row in rows]
        data = read_files(open_root(self.root)[0], paths)
        return [EncodedImage(content, path) for content, path in zip(data, paths, strict=True)]

    def name(self, split: SourceSplit, row: int) -> str:
        """The path of the image."""
        return posixpath.join(self.folder, _rows(self, split).paths[row])

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Broken lines (with file and line number), files that are missing, files listed twice."""
        listed = _rows(self, split)
        yield from listed.broken
        present = _present_files(open_root(self.root)[0], self.folder, listed.paths)
        broken = {problem.index for problem in listed.broken}
        first_row: dict[str, int] = {}
        for row, path in enumerate(listed.paths):
            if row in broken:
                continue
            if path not in present:
                yield RowProblem(row, self.name(split, row), "missing file")
            if first_row.setdefault(path, row) != row:
                yield RowProblem(row, self.name(split, row), f"listed twice, first as row {first_row[path]}")

    def identity(self, split: SourceSplit) -> str:
        """The content of the listed images."""
        listed = _rows(self, split)
        paths = [posixpath.join(self.folder, path) for path in listed.paths]
        return content_identity(open_root(self.root)[0], self.folder, paths, listed.labels)

    def provenance(self) -> dict[str, str]:
        """Root, lists read, and whether the images are a lossy copy."""
        return {
            "source": "vtab1k",
            "root": self.root,
            "encoding": describe_encoding(self._first_image(), self.task),
            "rows": _describe_order(self.root, self.folder),
            "licence": self.task.licence,
        }

    def _first_image(self) -> bytes:
        """The first training image whose row has no problem; no bytes where there is none."""
        bad = {problem.index for problem in self.problems("train")}
        usable = (row for row in range(len(_rows(self, "train").paths)) if row not in bad)
        paths = [self.name("train", row) for row in islice(usable, 1)]
        return b"".join(read_files(open_root(self.root)[0], paths))


def open_vtab1k(task: Task, root: str | None) -> Vtab1kSource:
    """A task's images in a VTAB-1k archive.

    Raises:
        SourceUnavailable: no folder of the task under the root.
    """
    root = require_root(root, task, _LAYOUT)
    folder = task_folder(root, task)
    if folder is None:
        raise SourceUnavailable(f"no folder {task.folder or task.name}/ in the VTAB-1k archive at {root}")
    return Vtab1kSource(root, folder, task)


@dataclass(frozen=True)
class _Listed:
    """The rows of a split, columns side by side."""

    paths: tuple[str, ...]
    labels: np.ndarray
    broken: tuple[RowProblem, ...]


@lru_cache(maxsize=32)
def _rows(source: Vtab1kSource, split: SourceSplit) -> _Listed:
    filesystem, folder = open_root(source.root)[0], source.folder
    for names in _LISTS[split]:
        texts = [read_text(filesystem, f"{folder}/{name}") for name in names]
        if None not in texts:
            return parse_lists(
                [(f"{folder}/{name}", text or "") for name, text in zip(names, texts, strict=True)]
            )
    expected = " or ".join(" and ".join(names) for names in _LISTS[split])
    raise SourceUnavailable(f"no list of the {split} images in {folder}: expected {expected}")


def parse_lists(lists: Sequence[tuple[str, str]]) -> _Listed:
    """Rows of the lists given as (path, text), one list after the other."""
    paths, labels, broken = [], [], []
    lines = [(name, number, line) for name, text in lists for number, line in enumerate(text.splitlines(), 1)]
    for row, (name, number, line) in enumerate(entry for entry in lines if entry[2].strip()):
        path, label = _parse_line(line)
        paths.append(path)
        labels.append(label)
        if label < 0:
            reason = f"expected 'path label', got '{line.strip()[:80]}'"
            broken.append(RowProblem(row, f"{name}:{number}", reason))
    return _Listed(tuple(paths), np.array(labels, dtype=np.int32), tuple(broken))


def _parse_line(line: str) -> tuple[str, int]:
    """Path and label of a line; the label is -1 where the line has no such two. Paths may hold spaces."""
    path, label = [*line.rsplit(maxsplit=1), ""][:2]
    # Python refuses to read thousands of digits; int32 holds no more than ten.
    if not label.isdecimal() or len(label) > 10 or int(label) > np.iinfo(np.int32).max or "\0" in path:
        return line.strip(), -1
    # One spelling of a path, so that a file that is listed twice is found, and one that is there too.
    return posixpath.normpath(path.strip()), int(label)


def _present_files(filesystem: FileSystem, folder: str, paths: Sequence[str]) -> set[str]:
    """Which of the paths are files, by one listing per directory: a look-up each is slow on object stores."""
    present = set()
    for directory in {posixpath.dirname(path) for path in paths}:
        selector = FileSelector(posixpath.join(folder, directory), allow_not_found=True)
        try:
            infos = filesystem.get_file_info(selector)
        except NotADirectoryError:
            continue
        present |= {posixpath.join(directory, info.base_name) for info in infos if info.type == FileType.File}
    return present


def _describe_order(root: str, folder: str) -> str:
    """Which lists hold the training rows; the fold scheme 'archive' needs the 800 before the 200."""
    filesystem, _ = open_root(root)
    joint, *parts = (read_text(filesystem, f"{folder}/{name}") for names in _LISTS["train"] for name in names)
    if joint is None:
        return "train800.txt and val200.txt"
    if None in parts:
        return "train800val200.txt"
    in_parts = parse_lists([("", part or "") for part in parts]).labels
    same = np.array_equal(in_parts, parse_lists([("", joint)]).labels)
    return (
        "train800val200.txt"
        if same
        else "train800val200.txt, not in the order of train800.txt and val200.txt"
    )
