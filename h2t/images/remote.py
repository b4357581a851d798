"""Files of image sources, on any file system that pyarrow opens (local, s3://, gs://)."""

import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from h2t.errors import UserError
from h2t.images.source import SourceUnavailable
from h2t.tasks import Task

_REMOTE_READS_AT_ONCE = 16
# Where hubs put the files of a data set without further name.
_UNNAMED_FOLDERS = ("data", "default")


@lru_cache(maxsize=64)
def open_root(root: str) -> tuple[FileSystem, str]:
    """The file system of a path or URI, and the path within it without a trailing slash.

    Raises:
        UserError: a URI of an unknown scheme.
    """
    if "://" not in root:
        return LocalFileSystem(), str(Path(root).expanduser().absolute())
    try:
        filesystem, path = FileSystem.from_uri(root)
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"cannot open the image root '{root}': {error}") from error
    return filesystem, path.rstrip("/")


def task_folder(root: str, task: Task, prefixes: Sequence[str] = ("",)) -> str | None:
    """Path, in its file system, of the folder in ``root`` named as the task, its folder or an alias."""
    filesystem, base = open_root(root)
    names = dict.fromkeys(name for name in (task.folder, task.name, *task.aliases) if name)
    candidates = [f"{base}/{prefix}{name}" for name in names for prefix in prefixes]
    infos = filesystem.get_file_info(candidates)
    return next((info.path for info in infos if info.type == FileType.Directory), None)


def require_root(root: str | None, task: Task, layout: str, *, may_be_file: bool = False) -> str:
    """``root``, once a folder is there, or a file where that will do.

    Raises:
        SourceUnavailable: no root was given, nothing is there, or its object store cannot be reached.
    """
    if not root:
        raise SourceUnavailable(f"the images of {task.name} need a root: {layout}")
    filesystem, path = open_root(root)
    try:
        kind = filesystem.get_file_info(path).type
    except OSError as error:
        raise SourceUnavailable(f"the images of {task.name}: cannot look into {root}: {error}") from error
    if kind == FileType.NotFound:
        raise SourceUnavailable(f"the images of {task.name} are not at {root}: expected {layout}")
    if kind == FileType.File and not may_be_file:
        raise SourceUnavailable(f"the images of {task.name}: {root} is a file, expected {layout}")
    return root


def list_files(filesystem: FileSystem, folder: str, suffix: str = "", recursive: bool = True) -> list[str]:
    """Paths of the files under a folder, links to nothing among them, '2' before '10'.

    Names that begin with a dot are hidden: such files and folders are left out.

    Raises:
        UserError: a name that is not UTF-8.
    """
    if isinstance(filesystem, LocalFileSystem):
        paths = _list_local(folder, recursive)
    else:
        infos = filesystem.get_file_info(FileSelector(folder, recursive=recursive, allow_not_found=True))
        paths = [info.path for info in infos if info.type != FileType.Directory]
    paths = [path for path in paths if path.lower().endswith(suffix) and not is_hidden(path[len(folder) :])]
    return sorted(paths, key=natural_order)


def _list_local(folder: str, recursive: bool) -> list[str]:
    """What is there; pyarrow would leave out links to nothing and stop at names that it can't read."""
    paths = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        for name in [*folders, *files]:
            _check_utf8(parent, name)
        paths += [posixpath.join(parent, name) for name in files]
        if not recursive:
            break
    return paths


def _check_utf8(folder: str, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        # Python writes bytes that are no UTF-8 as lone surrogates, which no terminal or table can show.
        shown = os.fsencode(name).decode(errors="backslashreplace")
        raise UserError(f"{folder}: expected names in UTF-8, got '{shown}'; rename that file") from None


def shards(filesystem: FileSystem, folder: str, suffix: str, split_names: Sequence[str]) -> list[str]:
    """A task's files in a folder itself, and at any depth below ``data/``, ``default/`` and a split's folder.

    Other sub-folders are left alone: they may hold other tasks.
    """
    folders = [
        name
        for name in list_folders(filesystem, folder)
        if name in _UNNAMED_FOLDERS or any(of_split([name], "", split) for split in split_names)
    ]
    below = [path for name in folders for path in list_files(filesystem, f"{folder}/{name}", suffix)]
    return list_files(filesystem, folder, suffix, recursive=False) + below


def list_folders(filesystem: FileSystem, folder: str) -> list[str]:
    """Names of the folders in a folder, '2' before '10'; hidden ones left out.

    Raises:
        UserError: a name that is not UTF-8.
    """
    if isinstance(filesystem, LocalFileSystem):
        names = next(os.walk(folder), ("", [], []))[1]
        for name in names:
            _check_utf8(folder, name)
    else:
        infos = filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
        names = [info.base_name for info in infos if info.type == FileType.Directory]
    return sorted((name for name in names if not is_hidden(name)), key=natural_order)


def of_split(paths: Iterable[str], base: str, split_name: str) -> list[str]:
    """Those of ``paths`` that name the split as a word below ``base``: 'train-01.parquet', 'train/a.tar'."""
    word = re.compile(rf"(^|[/_.=-]){re.escape(split_name)}([/_.-]|\d|$)")
    return [path for path in paths if word.search(path[len(base) :])]


def no_such_split(found: Sequence[str], base: str, split: str, name: str) -> SourceUnavailable:
    """The error for a split of which nothing is found, ``found`` being what there is instead."""
    shown = ", ".join(path.removeprefix(base).lstrip("/") for path in found[:10])
    more = ", …" if len(found) > 10 else ""
    return SourceUnavailable(
        f"no '{name}' for the {split} split in {base}, which has {shown}{more}; say which to take with "
        f"images.options.{split} (such as {split}: validation)"
    )


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which the numbers in names count as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def read_files(filesystem: FileSystem, paths: Sequence[str]) -> list[bytes]:
    """Whole files; no bytes for one that is not there or not ours to read.

    Remote ones are read several at a time.
    """

    def read(path: str) -> bytes:
        try:
            with filesystem.open_input_file(path) as file:
                return file.read()
        except (FileNotFoundError, PermissionError):
            return b""
        except OSError as error:  # a store that is away makes no bad image
            raise UserError(
                f"{path} cannot be read: {str(error).splitlines()[0]}; try again once its disk or store "
                "answers"
            ) from error

    if isinstance(filesystem, LocalFileSystem) or len(paths) < 2:
        return [read(path) for path in paths]
    with ThreadPoolExecutor(_REMOTE_READS_AT_ONCE) as pool:
        return list(pool.map(read, paths))


def read_text(filesystem: FileSystem, path: str) -> str | None:
    """A UTF-8 text file, or None where it is not there."""
    try:
        with filesystem.open_input_file(path) as file:
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None


def is_hidden(relative: str) -> bool:
    """Whether a file or a folder that it lies in has a name that begins with a dot."""
    return any(part.startswith(".") for part in relative.split("/"))
