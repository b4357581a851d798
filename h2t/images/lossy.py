"""How stored images are encoded, and whether that lost something."""

import io
from functools import lru_cache

from PIL import Image as PillowImage

from h2t.tasks import Task


def describe_encoding(data: bytes, task: Task) -> str:
    """The encoding of a task's image in words; 'lossy JPEG copy' where the original was lossless.

    Where the original is a JPEG too, one with exactly the tables of Pillow's default quality is
    'JPEG of quality 75, probably re-encoded': so the widespread VTAB-1k archive was written. 'unknown' where
    there is no image or a damaged one.
    """
    try:
        with PillowImage.open(io.BytesIO(data)) as image:
            return _describe(image, task)
    # Pillow's readers raise almost anything on damaged bytes; decoding will say what is wrong.
    except Exception:
        return "unknown"


def _describe(image: PillowImage.Image, task: Task) -> str:
    if image.format != "JPEG":
        return image.format or "unknown"
    if task.lossless:
        return "lossy JPEG copy"
    tables = getattr(image, "quantization", {})
    return "JPEG of quality 75, probably re-encoded" if tables.get(0) == _default_table() else "JPEG"


@lru_cache(maxsize=1)
def _default_table() -> list[int]:
    written = io.BytesIO()
    PillowImage.new("RGB", (8, 8)).save(written, format="JPEG")
    with PillowImage.open(written) as image:
        return image.quantization[0]  # type: ignore[attr-defined]
