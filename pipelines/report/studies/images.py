"""What the tasks look like, and images that Head2Toe gets right and linear wrong, and the reverse."""

import pandas as pd

from pipelines.report.frames import Frames
from pipelines.report.studies import Picture, Section, Strip, data_uri
from pipelines.report.tables import task_title, tasks_in_order
from pipelines.schemas import THUMBNAIL_KINDS

LIMIT = 2_000_000  # characters of images on a page


def section(frames: Frames) -> Section | None:
    """A strip of training images of each task, and two of test images; None without any."""
    rows = frames.thumbnails.drop_duplicates(["task", "kind", "index"])
    if rows.empty:
        return None
    strips, size, left_out = [], 0, 0
    for task in tasks_in_order(rows):
        for kind, title in THUMBNAIL_KINDS.items():
            some = rows[(rows["task"] == task) & (rows["kind"] == kind)]
            pictures = tuple(_picture(row) for row in some.to_dict("records"))
            size += sum(len(picture.source) for picture in pictures)
            if size > LIMIT:
                left_out += len(pictures)
            elif pictures:
                strips.append(Strip(f"{task_title(task)}: {title}", pictures))
    counts = rows.drop_duplicates(["task", "kind", "index"])["kind"].value_counts()
    words = (
        f"Shown are {counts.get('gained', 0)} test images that Head2Toe gets right and linear wrong, and "
        f"{counts.get('lost', 0)} of the reverse: those that the seeds agree on most."
        + (f" Left out to keep the page small: {left_out} images." if left_out else "")
    )
    return Section("images", "Look at the images", 60, words, strips=tuple(strips))


def _picture(row: dict) -> Picture:
    said = "" if pd.isna(row["prediction"]) else f", not {row['prediction']}"
    return Picture(data_uri(row["image"]), f"{row['label']}{said}")
