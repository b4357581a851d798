"""From the name of a format to the images of a task."""

import inspect
from collections.abc import Callable
from typing import Any

from h2t.errors import UserError, unknown
from h2t.images.demo import open_bundled
from h2t.images.folder import open_folder
from h2t.images.parquet import open_parquet
from h2t.images.source import ImageSource
from h2t.images.subset import arrange
from h2t.images.vtab_archive import open_vtab1k
from h2t.images.webdataset import open_webdataset
from h2t.tasks import Task

SOURCES: dict[str, Callable[..., ImageSource]] = {
    "bundled": open_bundled,
    "vtab1k": open_vtab1k,
    "parquet": open_parquet,
    "folder": open_folder,
    "webdataset": open_webdataset,
}
"""By the name of the format. Beyond task and root, the keyword arguments are the format's options."""

WITHOUT_ROOT = "bundled"
# Folders come sorted by class, which consecutive folds cannot use.
_SHUFFLED = {"folder": 0}


def open_source(format: str, task: Task, root: str | None, options: dict[str, Any]) -> ImageSource:
    """The images of a task.

    Args:
        format: a key of ``SOURCES``.
        task: known or a user's own.
        root: path or URI (``s3://``, ``gs://``); none for ``bundled``.
        options: of the format (see its function), and of every format ``shuffle``, ``n_train`` and ``n_test``
            (see :func:`h2t.images.subset.arrange`).

    Raises:
        UserError: an unknown format or option, or an option of the wrong type.
        SourceUnavailable: the images are not here; the message says how to get them.
    """
    if format not in SOURCES:
        raise unknown("image format", format, SOURCES)
    stated = {"shuffle": _SHUFFLED.get(format), **options}
    specific, common = _options(SOURCES[format]), _options(arrange)
    for name, value in options.items():
        _check_option(format, name, value, specific | common)
    source = SOURCES[format](
        task, root, **{name: value for name, value in stated.items() if name in specific}
    )
    return arrange(source, **{name: value for name, value in stated.items() if name in common})


def check_format(format: str, root: str | None) -> None:
    """Raise UserError for an unknown format, and for a root that is missing or has no use."""
    if format not in SOURCES:
        raise unknown("image format", format, SOURCES)
    if format != WITHOUT_ROOT and not root:
        raise UserError(f"images in the format '{format}' need a root (a folder or a URI)")
    if format == WITHOUT_ROOT and root:
        others = ", ".join(name for name in SOURCES if name != WITHOUT_ROOT)
        raise UserError(f"with a root ('{root}') expected the format {others}, got '{format}'")


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
