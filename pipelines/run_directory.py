"""The run directory: files that are whole or absent, at a local path or in an object store.

``pipelines/artifacts.py`` says which files there are.
"""

import errno
import io
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from pyarrow import fs

from h2t.errors import UserError
from h2t.parquet_bounds import check_expansion

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# How pyarrow tells that a store does not answer, or refuses; what is in a file raises other words.
OF_A_STORE = re.compile(r"AWS Error|Azure Error|google::cloud::Status|curlCode")
TEMPORARY = ".tmp-"  # readers of Parquet data sets skip names that start with a dot
KEY = re.compile(r"-[0-9a-f]{12}$")  # what the name of a file that depends on a configuration ends in


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """A file system and a path in it, from a local path or any URI that ``pyarrow.fs`` opens."""
    try:
        if "://" not in uri:
            return fs.LocalFileSystem(), fs.FileSystem.from_uri(_absolute(uri))[1]
        return fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"can't open '{uri}': expected a local path or a URI such as s3:// or gs:// ({error})"
        ) from None


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


@dataclass(frozen=True)
class RunDirectory:
    """A run directory at a local path or URI; cheap to send to workers."""

    uri: str

    def __post_init__(self) -> None:
        if "://" not in self.uri:
            object.__setattr__(self, "uri", _absolute(self.uri))
        open_filesystem(self.uri)

    @classmethod
    def around(cls, place: str) -> "tuple[RunDirectory, str]":
        """The folder of a file at a path or URI, and the file's name in it."""
        folder, _, name = place.rpartition("/")
        return cls(folder or "."), name

    def subdirectory(self, name: str) -> "RunDirectory":
        """A folder in this one; options of a URI (``?endpoint_override=…``) are kept."""
        path, sign, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return RunDirectory(f"{path.rstrip('/')}/{name}{sign}{options}")

    def _locate(self, name: str) -> tuple[fs.FileSystem, str]:
        filesystem, root = open_filesystem(self.uri)
        return filesystem, f"{root.rstrip('/')}/{name}" if name else root

    def require_writable(self) -> None:
        """Raise UserError unless files can be written here. Leaves nothing behind, not even a folder."""
        filesystem, root = open_filesystem(self.uri)
        try:
            if isinstance(filesystem, fs.LocalFileSystem):
                there = next(folder for folder in (Path(root), *Path(root).parents) if folder.exists())
                tempfile.TemporaryFile(dir=there).close()
            else:
                probe = f"{root.rstrip('/')}/{TEMPORARY}{uuid.uuid4().hex[:8]}"
                filesystem.open_output_stream(probe).close()
                filesystem.delete_file(probe)
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or error  # an OSError's own text names the probe
            raise UserError(
                f"can't write to the run directory '{self.uri}': {reason}; expected a folder or URI that "
                "can be written to"
            ) from None

    def write(self, name: str, data: bytes) -> None:
        """Write a file that appears whole or not at all."""
        with self.writing(name) as sink:
            sink.write(data)

    @property
    def local(self) -> bool:
        """Whether it is on a file system, where a file can be created exclusively, and not in a store."""
        return isinstance(open_filesystem(self.uri)[0], fs.LocalFileSystem)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless one of that name is there; whether it was written.

        In an object store two writers at the same moment may both succeed: the later one's stands.
        """
        if not self.local:
            if self.exists(name):
                return False
            self.write(name, data)
            return True
        self.write(temporary := f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{name}", data)
        target = self._locate(name)[1]
        try:
            os.link(self._locate(temporary)[1], target)
        except FileExistsError:
            return False
        finally:
            self.delete(temporary)
        return True

    def writing(self, name: str) -> "_AtomicFile":
        """A context with a binary sink; the file appears under its name when the context ends well."""
        return _AtomicFile(*self._locate(name))

    def write_table(self, name: str, table: pa.Table, **options: Any) -> None:
        """Write a table as one Parquet file, whole or not at all."""
        with self.writing(name) as sink:
            pq.write_table(table, sink, write_page_checksum=True, **options)

    def write_json(self, name: str, value: Any) -> None:
        """Write plain values as JSON, whole or not at all."""
        self.write(name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def read(self, name: str, n_bytes: int | None = None) -> bytes:
        """The content of a file, or its first ``n_bytes``."""
        filesystem, path = self._locate(name)
        with self._answering(name), filesystem.open_input_file(path) as source:
            return bytes(source.read(n_bytes))

    def read_header(self, name: str) -> bytes:
        """The beginning of a safetensors file, which says what is in it: 8 bytes of length, and the JSON."""
        return self.read(name, 8 + int.from_bytes(self.read(name, 8), "little"))

    def size(self, name: str) -> int:
        """The number of bytes of a file."""
        filesystem, path = self._locate(name)
        with self._answering(name):
            return int(filesystem.get_file_info(path).size)

    def read_json(self, name: str) -> Any:
        """The plain values of a JSON file."""
        return json.loads(self.read(name))

    def read_table(self, names: Iterable[str], columns: list[str] | None = None) -> pa.Table:
        """Parquet files of one schema as one table, in the order of ``names``.

        Raises UserError that names a file which is not as it was written.
        """
        tables = []
        for name in names:
            with self.open_table(name) as file, naming_damage(name):
                tables.append(file.read(columns))
        return pa.concat_tables(tables, promote_options="default")

    @contextmanager
    def open_table(self, name: str) -> Iterator[pq.ParquetFile]:
        """One Parquet file to read parts of, whose checksums are compared.

        Raises UserError that names it where it is not as it was written.
        """
        filesystem, path = self._locate(name)
        with naming_damage(name):
            file = pq.ParquetFile(path, filesystem=filesystem, page_checksum_verification=True)
        with file:
            try:
                check_expansion(file.metadata, "it")
            except UserError as error:
                raise damaged(name, error) from None
            yield file

    def read_frame(self, names: Iterable[str], columns: list[str] | None = None) -> pd.DataFrame:
        """Parquet files as one data frame, in the order of ``names``; empty without any."""
        frames = [self.read_table([name], columns).to_pandas() for name in names]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def exists(self, name: str) -> bool:
        """Whether a file of that name is there."""
        filesystem, path = self._locate(name)
        with self._answering(name):
            return filesystem.get_file_info(path).type == fs.FileType.File

    def names(self, folder: str, recursive: bool = False) -> list[str]:
        """Names of the files in a folder, relative to the run directory, sorted."""
        filesystem, path = self._locate(folder)
        selector = fs.FileSelector(path, allow_not_found=True, recursive=recursive)
        with self._answering(folder):
            infos = filesystem.get_file_info(selector)
        files = [info.path for info in infos if info.type == fs.FileType.File]
        return sorted(f"{folder}/{file[len(path) :].lstrip('/')}" for file in files)

    def keyed_names(self, folder: str, ending: str, recursive: bool = False) -> list[str]:
        """Those names in a folder that end in a key and ``ending``.

        What else lies there, somebody's notes or what a writer that was killed has left, is not ours to read.
        """
        return [
            name
            for name in self.names(folder, recursive)
            if name.endswith(ending) and KEY.search(name.removesuffix(ending)) and "/." not in f"/{name}"
        ]

    def archive_all(self, folder: str, condition: Callable[[str], bool], archive: str) -> list[str]:
        """Move the files of a folder that meet a condition to ``<archive>/<folder>``; their names.

        Temporary files of a writer that was killed are deleted.
        """
        self._refuse_links(folder)
        names = self.names(folder)
        temporary = [name for name in names if name.rpartition("/")[2].startswith(TEMPORARY)]
        for name in temporary:
            self.delete(name)
        chosen = [name for name in names if name not in temporary and condition(name)]
        for name in chosen:
            self._move(name, f"{archive}/{name}")
        return chosen

    def restore_all(self, folder: str, condition: Callable[[str, str], bool], archive: str) -> list[str]:
        """Take back files that are not in the folder and meet a condition on name and present location."""
        present = set(self.names(folder))
        archived = (name.removeprefix(f"{archive}/") for name in self.names(f"{archive}/{folder}"))
        names = [name for name in archived if name not in present and condition(name, f"{archive}/{name}")]
        for name in names:
            self._move(f"{archive}/{name}", name)
        return names

    def _refuse_links(self, folder: str) -> None:
        """Files are moved and deleted in folders of the run directory alone, not where a link leads."""
        if not self.local:
            return
        parts = folder.split("/")
        for length in range(1, len(parts) + 1):
            path = Path(self._locate("/".join(parts[:length]))[1])
            if path.is_symlink():
                raise UserError(
                    f"'{path}' is a link to '{path.resolve()}': expected a folder, since files in it may be "
                    "moved or deleted; link the whole run directory instead"
                )

    def _move(self, name: str, to: str) -> None:
        filesystem, source = self._locate(name)
        _, target = self._locate(to)
        with self._answering(name):
            filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            filesystem.move(source, target)

    def delete(self, name: str) -> None:
        """Delete a file."""
        filesystem, path = self._locate(name)
        with self._answering(name):
            filesystem.delete_file(path)

    @contextmanager
    def _answering(self, name: str) -> Iterator[None]:
        """Turn what a disk or store raises that does not answer into ``Unreachable``."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise unreachable(self._locate(name)[1], error) from None


class Unreachable(UserError):
    """Nothing is known of a file, since its disk or store does not answer: it is no damaged one."""


def of_storage(error: OSError) -> bool:
    """Whether it is a disk or store that failed, and not what is in a file."""
    return bool(error.errno or OF_A_STORE.search(str(error)))


def unreachable(place: str, error: OSError) -> Unreachable:
    """The error of a file that cannot be reached for now, or by this user."""
    reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
    return Unreachable(
        f"{place} cannot be reached: {reason}; nothing there was changed, and the same command goes on once "
        "its disk or store answers"
    )


def damaged(name: str, reason: object) -> UserError:
    """The error of a file that is not what was written; as text, too, ``damaged_file`` knows it."""
    first = (str(reason) or type(reason).__name__).splitlines()[0]
    return UserError(f"{name} is damaged: {first}")


def damaged_file(error: UserError) -> str:
    """The name of the file that an error calls damaged; "" for any other error."""
    match = re.match(r"^(\S+\.\w+) is damaged: ", str(error))
    return match[1] if match else ""


@contextmanager
def naming_damage(name: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if of_storage(error):
            raise unreachable(name, error) from None
        raise damaged(name, error) from None
    except pa.ArrowException as error:
        raise damaged(name, error) from None


class _AtomicFile:
    """Local files get a temporary name and are renamed; object stores show a file only when it is whole.

    Raises UserError where a disk or store does not take the file.
    """

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path
        folder, _, base = path.rpartition("/")
        self.local = isinstance(filesystem, fs.LocalFileSystem)
        self.target = f"{folder}/{TEMPORARY}{uuid.uuid4().hex[:8]}-{base}" if self.local else path
        self.buffer = io.BytesIO()

    def __enter__(self) -> Any:
        if not self.local:
            return self.buffer
        try:
            self.filesystem.create_dir(self.target.rpartition("/")[0], recursive=True)
            self.sink = self.filesystem.open_output_stream(self.target)
        except OSError as error:
            raise not_written(self.path, error) from None
        return self.sink

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._finish(kind)
        except OSError as failed:
            error = error or failed
        if isinstance(error, OSError) and of_storage(error):
            if self.local:  # what is half written takes room too
                with suppress(OSError):
                    self.filesystem.delete_file(self.target)
            raise not_written(self.path, error) from None
        if error is not None and kind is None:
            raise error

    def _finish(self, kind: Any) -> None:
        if not self.local:
            if kind is None:
                with self.filesystem.open_output_stream(self.path) as stream:
                    stream.write(self.buffer.getbuffer())
            return
        self.sink.close()
        if kind is None:
            self.filesystem.move(self.target, self.path)
        else:
            self.filesystem.delete_file(self.target)


def not_written(path: str, error: OSError) -> UserError:
    """The error of a file that a disk or store does not take."""
    if error.errno in NO_ROOM:
        return UserError(
            f"no room left for {path}: {os.strerror(error.errno)}; make room, and the same command goes on"
        )
    if error.errno:
        return UserError(
            f"{path} cannot be written: {os.strerror(error.errno)}; make its folder one that can be written "
            "to, and the same command goes on"
        )
    return unreachable(path, error)
