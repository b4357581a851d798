"""WebDataset shards: tar files of samples ``<key>.<png|jpg|…>`` and ``<key>.cls``, as on the hub.

Tar files are read with the standard library: a first pass over the headers notes where every image starts,
and images are then read at random.
"""

import io
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from pyarrow.fs import FileSystem

from h2t.images.identity import content_identity
from h2t.images.lossy import describe_encoding
from h2t.images.remote import (
    is_hidden,
    no_such_split,
    of_split,
    open_root,
    require_root,
    shards,
    task_folder,
)
from h2t.images.source import EncodedImage, FileSource, Image, RowProblem, SourceSplit, SourceUnavailable
from h2t.tasks import Task

_LAYOUT = "a folder with train/*.tar and test/*.tar of images and .cls files"
_SUFFIXES = ("webp", "png", "jpg", "jpeg", "bmp", "tif", "tiff", "gif", "ppm", "pgm")
_PREFIXES = ("", "wds_vtab-", "wds_")
# One read of an object store brings many headers, and small images with them.
_HEADER_BUFFER = 1 << 20


@dataclass(frozen=True)
class WebDatasetSource(FileSource):
    """Samples in the order of the shards ('2.tar' before '10.tar') and, within a shard, of its files."""

    root: str
    folder: str  # within the root's file system
    task: Task
    train: str = "train"  # the splits' names in the paths of shards
    test: str = "test"
    image: str = ""  # the part of a sample that is the image; "" = the one with an ending of an image
    label: str = ""  # likewise the label; "" = cls

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [n], -1 where a sample has no label or one that is no integer."""
        return np.array([sample.label for sample in _samples(self, split)], dtype=np.int32)

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Images as stored."""
        samples = _samples(self, split)
        images: list[Image] = [EncodedImage(b"", "")] * len(rows)
        for shard in dict.fromkeys(samples[row].shard for row in rows):
            with open_root(self.root)[0].open_input_file(shard) as file:
                for position, row in enumerate(rows):
                    if samples[row].shard == shard:
                        data = file.read_at(samples[row].size, samples[row].offset)
                        images[position] = EncodedImage(data, samples[row].path)
        return images

    def name(self, split: SourceSplit, row: int) -> str:
        """Shard and key."""
        return _samples(self, split)[row].path

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Samples without an image or a usable label, and keys that occur twice."""
        first_row: dict[str, int] = {}
        for row, sample in enumerate(_samples(self, split)):
            if not sample.size:
                yield RowProblem(row, sample.path, "no image, or several: expected one")
            if sample.label < 0:
                yield RowProblem(row, sample.path, "no .cls file with a non-negative integer")
            if first_row.setdefault(sample.path, row) != row:
                yield RowProblem(row, sample.path, f"key occurs twice, first as row {first_row[sample.path]}")

    def identity(self, split: SourceSplit) -> str:
        """The content of the shards that hold the split."""
        samples = _samples(self, split)
        paths = list(dict.fromkeys(sample.shard for sample in samples))
        return content_identity(open_root(self.root)[0], self.folder, paths, self.labels(split), self.image)

    def provenance(self) -> dict[str, str]:
        """Root and encoding of the first image."""
        first = self.read("train", range(min(1, len(_samples(self, "train")))))
        data = b"".join(image.data for image in first if isinstance(image, EncodedImage))
        return {
            "source": "webdataset",
            "root": self.root,
            "encoding": describe_encoding(data, self.task),
            "licence": self.task.licence,
        }


def open_webdataset(
    task: Task,
    root: str | None,
    *,
    train: str = "train",
    test: str = "test",
    image: str = "",
    label: str = "",
) -> WebDatasetSource:
    """A task's shards in a folder, or in a sub-folder of the task's name ('wds_vtab-<name>' too).

    Args:
        train: name of the training split in the paths of shards.
        test: likewise for the test split.
        image: the part of a sample's files that is the image, such as ``jpg`` or ``left.png``.
        label: likewise the label, a file of one integer.

    Raises:
        SourceUnavailable: nothing there; later, when they are listed, for a split without shards.
    """
    root = require_root(root, task, _LAYOUT)
    filesystem, base = open_root(root)
    folder = task_folder(root, task, _PREFIXES) or base
    if not shards(filesystem, folder, ".tar", (train, test)):
        raise SourceUnavailable(f"no tar files of {task.name} in {folder}: expected {_LAYOUT}")
    return WebDatasetSource(root, folder, task, train, test, image.lower(), label.lower())


@dataclass(frozen=True, slots=True)
class _Sample:
    """Where an image lies; size 0 where the sample has none."""

    path: str  # shard and key
    shard: str
    offset: int
    size: int
    label: int


@lru_cache(maxsize=32)
def _samples(source: WebDatasetSource, split: SourceSplit) -> tuple[_Sample, ...]:
    filesystem, _ = open_root(source.root)
    names = {"train": source.train, "test": source.test}
    paths = shards(filesystem, source.folder, ".tar", tuple(names.values()))
    parts: set[str] = set()
    samples: list[_Sample] = []
    of_this = of_split(paths, source.folder, names[split])
    if not of_this:
        raise no_such_split(paths, source.folder, split, names[split])
    for shard in of_this:
        samples += _samples_of_shard(source, filesystem, shard, parts)
    if samples and not any(sample.size for sample in samples):
        expected = source.image or ", ".join(_SUFFIXES)
        raise SourceUnavailable(
            f"no images in the {split} shards of {source.folder}: expected samples with one of the parts "
            f"{expected}, got {', '.join(sorted(parts)[:20])}; say which is the image with "
            "images.options.image, and which the label with images.options.label"
        )
    return tuple(samples)


def _samples_of_shard(
    source: WebDatasetSource, filesystem: FileSystem, shard: str, parts: set[str]
) -> list[_Sample]:
    """Consecutive members of one key are a sample; a key that comes back later is a second one."""
    try:
        with (
            filesystem.open_input_file(shard) as file,
            tarfile.open(fileobj=io.BufferedReader(file, _HEADER_BUFFER), mode="r:") as archive,
        ):
            # Archives of macOS have a hidden companion of each file.
            members = [m for m in archive if m.isfile() and not is_hidden(posixpath.normpath(m.name))]
            by_key = _by_key(members, source.image)
            samples = [_sample(source, shard, key, by_part, archive) for key, by_part in by_key]
            parts |= {part for _, by_part in by_key for part in by_part}
            # tarfile takes damage in the middle, and an end without its mark, for the end.
            if file.read_at(tarfile.BLOCKSIZE, archive.offset) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end mark at byte {archive.offset}")
    except tarfile.TarError as error:
        raise SourceUnavailable(f"{shard} is not a whole tar file: {error}") from error
    return samples


def _by_key(members: Sequence[tarfile.TarInfo], image: str) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key and members by part of each sample, which ends where the key changes or a part comes again.

    The key ends at the first dot, as in the library WebDataset, unless that gives samples of several images:
    then keys have dots themselves, and end at the last. ``image``: the part that is the image, if stated.
    """
    samples = _grouped(members, str.partition)
    if any(image in by_part for _, by_part in samples):
        return samples
    if any(len(_images(by_part)) > 1 for _, by_part in samples):
        return _grouped(members, str.rpartition)
    return samples


def _grouped(
    members: Sequence[tarfile.TarInfo], cut: Callable[[str, str], tuple[str, str, str]]
) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    samples: list[tuple[str, dict[str, tarfile.TarInfo]]] = []
    for member in members:
        folder, name = posixpath.split(posixpath.normpath(member.name))
        stem, _, part = cut(name, ".")
        key, part = posixpath.join(folder, stem), part.lower()
        if not samples or key != samples[-1][0] or part in samples[-1][1]:
            samples.append((key, {}))
        samples[-1][1][part] = member
    return samples


def _images(by_part: Mapping[str, tarfile.TarInfo]) -> list[str]:
    """Parts that are images: 'png', or 'left.png' where no part is called 'png' alone."""
    return [part for part in _SUFFIXES if part in by_part][:1] or _ending_in(by_part, _SUFFIXES)


def _ending_in(by_part: Mapping[str, tarfile.TarInfo], endings: Sequence[str]) -> list[str]:
    return [part for part in by_part if part.rpartition(".")[2] in endings]


def _sample(
    source: WebDatasetSource,
    shard: str,
    key: str,
    by_part: Mapping[str, tarfile.TarInfo],
    archive: tarfile.TarFile,
) -> _Sample:
    images = [source.image] if source.image else _images(by_part)
    labels = [source.label] if source.label else ["cls"] if "cls" in by_part else _ending_in(by_part, ["cls"])
    image, label = (by_part.get(parts[0]) if len(parts) == 1 else None for parts in (images, labels))
    offset, size = (image.offset_data, image.size) if image else (0, 0)
    return _Sample(f"{shard}#{key}", shard, offset, size, _label(archive, label))


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo | None) -> int:
    content = archive.extractfile(member) if member else None
    text = content.read().decode("ascii", errors="replace").strip() if content else ""
    return int(text) if text.isdecimal() and int(text) <= np.iinfo(np.int32).max else -1
