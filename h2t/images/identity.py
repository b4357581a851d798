"""What identifies images: their content, wherever they lie and however often they are opened."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
from pyarrow.fs import FileInfo, FileSystem, FileType, LocalFileSystem

_AT_ONCE = 8  # hashing gives the interpreter free
_REQUESTS_AT_ONCE = 32  # which wait for the store


def content_identity(
    filesystem: FileSystem, folder: str, paths: Sequence[str], labels: np.ndarray, *options: Any
) -> str:
    """Hexadecimal digits that change with files, their order, labels and ``options`` (plain values).

    ``paths``: within ``filesystem``, named relative to ``folder`` so that a moved folder keeps its identity.
    A local file counts with the SHA-256 of its bytes; one of an object store, which would have to be fetched,
    with its size and the store's own mark of its content (the ETag); one that is not there as missing.
    """
    infos = filesystem.get_file_info(list(paths))
    local = isinstance(filesystem, LocalFileSystem)
    with ThreadPoolExecutor(_AT_ONCE if local else _REQUESTS_AT_ONCE) as pool:
        contents = list(pool.map(_hash if local else partial(_mark, filesystem), infos))
    names = [path[len(folder) :] for path in paths]
    listed = json.dumps([list(zip(names, contents, strict=True)), options])
    return hashlib.sha256(listed.encode() + labels.tobytes()).hexdigest()


def _mark(filesystem: FileSystem, info: FileInfo) -> str:
    if info.type != FileType.File:
        return "missing"
    with filesystem.open_input_stream(info.path) as file:
        written = {_text(key).lower(): _text(value) for key, value in (file.metadata() or {}).items()}
        mark = written.get("etag") or hashlib.sha256(file.read()).hexdigest()
    return f"{info.size} bytes, {mark}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _hash(info: FileInfo) -> str:
    if info.type != FileType.File:
        return "missing"
    return _hash_of_file(info.path, info.size, info.mtime_ns)


# Time and size save hashing again within a process; they are no part of an identity.
@lru_cache(maxsize=1 << 20)
def _hash_of_file(path: str, size: int, mtime_ns: int) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # one that may not be read is reported as a bad row
        return "unreadable"
