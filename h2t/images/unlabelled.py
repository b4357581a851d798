"""Images without labels: files, folders, patterns and Parquet, local or in an object store."""

import glob
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyarrow.fs import FileType

from h2t.errors import UserError
from h2t.images.folder import image_endings
from h2t.images.parquet import has_images, image_column, stream_images
from h2t.images.remote import list_files, open_root, read_files
from h2t.images.source import EncodedImage

READ_AT_ONCE = 64
TABLE = ".parquet"
_EXPECTED = "an image, a folder of them, a pattern such as 'photos/*.jpg', or a Parquet file with images"


@dataclass(frozen=True)
class ImageFiles:
    """Files at one place, each an image or a Parquet file of them."""

    root: str
    paths: tuple[str, ...]
    n_images: int

    @property
    def tables(self) -> bool:
        """Whether they are Parquet files."""
        return self.paths[0].lower().endswith(TABLE)

    def __iter__(self) -> Iterator[EncodedImage]:
        """The images in order, a few in memory at a time; no bytes stand for a file that cannot be read."""
        filesystem, _ = open_root(self.root)
        for start in range(0, len(self.paths), READ_AT_ONCE):
            several = self.paths[start : start + READ_AT_ONCE]
            if self.tables:
                for path in several:
                    yield from stream_images(self.root, path)
            else:
                for path, data in zip(several, read_files(filesystem, several), strict=True):
                    yield EncodedImage(data, path)


def find_images(inputs: Sequence[str]) -> list[ImageFiles]:
    """The images at paths and URIs: of a folder all below it, of a pattern all that fit it.

    Raises UserError for a place where there are none.
    """
    return [found for place in inputs for found in _at(place)]


def _at(place: str) -> list[ImageFiles]:
    if "://" not in place and glob.has_magic(place) and not posixpath.exists(place):
        matches = sorted(glob.glob(place, recursive=True))
        if not matches:
            raise UserError(f"nothing fits '{place}': expected {_EXPECTED}")
        return [found for match in matches for found in _at(match)]
    filesystem, path = open_root(place)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise UserError(f"cannot look into '{place}': {error}") from error
    if info.type == FileType.NotFound:
        raise UserError(f"there is nothing at '{place}': expected {_EXPECTED}")
    paths = [path] if info.type == FileType.File else list_files(filesystem, path)
    tables = [name for name in paths if name.lower().endswith(TABLE)]
    files = [name for name in paths if posixpath.splitext(name)[1].lower() in image_endings()]
    if info.type == FileType.File and not tables:
        files = paths  # whatever its name: what was named is tried
    elif info.type != FileType.File:
        tables = [name for name in tables if has_images(place, name)]  # predictions may lie there too
    found = [ImageFiles(place, tuple(files), len(files))] if files else []
    if tables:
        rows = sum(image_column(place, name)[1] for name in tables)
        found.append(ImageFiles(place, tuple(tables), rows))
    if not found:
        raise UserError(f"no images in '{place}': expected {_EXPECTED}")
    return found
