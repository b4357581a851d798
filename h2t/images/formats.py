"""From the name of a format to the images of a task."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from h2t.errors import UserError, unknown
from h2t.images.demo import open_bundled
from h2t.images.folder import open_folder
from h2t.images.huggingface import open_huggingface
from h2t.images.parquet import open_parquet
from h2t.images.source import ImageSource
from h2t.images.subset import arrange
from h2t.images.table import open_table
from h2t.images.vtab_archive import open_vtab1k
from h2t.images.webdataset import open_webdataset
from h2t.tasks import Task


@dataclass(frozen=True)
class ImageFormat:
    """A way in which images are kept.

    ``open``: makes the source of a task from the task, the root and the format's options, which are the
    keyword arguments. ``advice``: how to get VTAB-1k's images in this format, with ``{folder}`` and
    ``{name}`` of the task. ``shuffle``: seed of the order of the rows, unless a recipe gives one.
    ``packaged``: the images come with installed packages, so they have no root.
    """

    open: Callable[..., ImageSource]
    advice: str = ""
    shuffle: int | None = None
    packaged: bool = False


FORMATS: dict[str, ImageFormat] = {
    "bundled": ImageFormat(open_bundled, packaged=True),
    "vtab1k": ImageFormat(
        open_vtab1k, "add {folder}/ from a copy of the VTAB-1k archive, or write Parquet: h2t prepare"
    ),
    "parquet": ImageFormat(open_parquet, "h2t prepare"),
    # Folders come sorted by class, which consecutive folds cannot use.
    "folder": ImageFormat(
        open_folder, "add images as {name}/train/<class>/ and {name}/test/<class>/", shuffle=0
    ),
    "huggingface": ImageFormat(
        open_huggingface, "save the data set of {name} with save_to_disk of the library datasets", shuffle=0
    ),
    "table": ImageFormat(open_table, "list the images of {name} in a .csv of paths and labels", shuffle=0),
    "webdataset": ImageFormat(
        open_webdataset,
        "add the shards of wds_vtab-{name} from a data set hub as {name}/train/ and {name}/test/",
    ),
}
ROOTED = tuple(name for name, format in FORMATS.items() if not format.packaged)
"""The formats whose images are kept at a root."""


def open_source(format: str, task: Task, root: str | None, options: dict[str, Any]) -> ImageSource:
    """The images of a task.

    Args:
        format: a key of ``FORMATS``.
        task: known or a user's own.
        root: path or URI (``s3://``, ``gs://``); none for packaged images.
        options: of the format (see its function), and of every format those of
            :func:`h2t.images.subset.arrange`.

    Raises:
        UserError: an unknown format or option, or an option of the wrong type.
        SourceUnavailable: the images are not here; the message says how to get them.
    """
    found = find_format(format)
    stated = {"shuffle": found.shuffle, **options}
    specific, common = _options(found.open), _options(arrange)
    for name, value in options.items():
        _check_option(format, name, value, specific | common)
    source = found.open(task, root, **{name: value for name, value in stated.items() if name in specific})
    return arrange(source, **{name: value for name, value in stated.items() if name in common})


def find_format(name: str) -> ImageFormat:
    """The format of that name. Raises UserError for an unknown one."""
    if name not in FORMATS:
        raise unknown("image format", name, FORMATS)
    return FORMATS[name]


def check_format(format: str, root: str | None) -> None:
    """Raise UserError for an unknown format, and for a root that is missing or has no use."""
    packaged = find_format(format).packaged
    if not packaged and not root:
        raise UserError(f"images in the format '{format}' need a root (a folder or a URI)")
    if packaged and root:
        raise UserError(f"with a root ('{root}') expected the format {', '.join(ROOTED)}, got '{format}'")


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of the keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return {item.name: item.annotation for item in parameters if item.kind is item.KEYWORD_ONLY}


def _check_option(format: str, name: str, value: Any, known: dict[str, Any]) -> None:
    if name not in known:
        raise unknown(f"option of {format} images", name, known)
    expected = known[name] | int if known[name] is float else known[name]
    if isinstance(value, bool) or not isinstance(value, expected):
        wanted = getattr(expected, "__name__", expected)
        raise UserError(f"option '{name}' of {format} images: expected {wanted}, got {value!r}")
