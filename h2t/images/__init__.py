"""Images of a task: where they come from, how they are decoded, and how a backbone reads them."""

from h2t.images.checks import BadRow, check_rows, count_classes
from h2t.images.decoding import decode
from h2t.images.opening import SOURCES, class_names, open_source
from h2t.images.preprocessing import Preprocessing, prepare, to_batch
from h2t.images.readiness import TaskReadiness, check_root
from h2t.images.source import BadImage, EncodedImage, Image, ImageSource, SourceUnavailable, Split

__all__ = [
    "SOURCES",
    "BadImage",
    "BadRow",
    "EncodedImage",
    "Image",
    "ImageSource",
    "Preprocessing",
    "SourceUnavailable",
    "Split",
    "TaskReadiness",
    "check_root",
    "check_rows",
    "class_names",
    "count_classes",
    "decode",
    "open_source",
    "prepare",
    "to_batch",
]
