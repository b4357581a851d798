"""Small images for the report: what a task looks like, and where Head2Toe and linear disagree."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from h2t.images.preprocessing import decode
from h2t.images.source import BadImage
from pipelines.artifacts import task_columns
from pipelines.task_data import Split, TaskData

METHOD, BASELINE = "head2toe", "linear"
SIDE = 72  # pixels of the longer side
N_TRAINING, N_TEST = 12, 8  # of each strip: 19 tasks make 1.4 MB of a page


def thumbnail_rows(task: TaskData, predictions: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of ``schemas.THUMBNAILS`` of a task; ``predictions``: rows of ``schemas.PREDICTIONS`` of it.

    An image that cannot be read is left out.
    """
    names = task.sources["train"][0].class_names()
    chosen: list[tuple[str, Split, int, int | None]] = [
        ("training", "train", row, None) for row in one_of_each_class(task.labels["train"])
    ]
    chosen += [(kind, "test", *wrong) for kind, wrong in disagreements(predictions)]
    for kind, split, row, prediction in chosen:
        label = int(task.labels[split][row])
        try:
            image = thumbnail(decode(task.read(split, [row])[0]))
        except BadImage:
            continue
        yield {
            **task_columns(task),
            "kind": kind,
            "index": row,
            "label": names[label] if names else str(label),
            "prediction": None if prediction is None else names[prediction] if names else str(prediction),
            "image": image,
        }


def one_of_each_class(labels: np.ndarray) -> list[int]:
    """At most N_TRAINING rows: the first of each class, then the second, and so on."""
    rank = pd.Series(labels).groupby(labels).cumcount().to_numpy()
    order = np.lexsort((np.arange(len(labels)), labels, rank))
    return [int(row) for row in order if labels[row] >= 0][:N_TRAINING]


def disagreements(predictions: pd.DataFrame) -> Iterator[tuple[str, tuple[int, int]]]:
    """Kind, and test image with its wrong prediction: what most seeds agree on first, N_TEST of each."""
    right = predictions.assign(right=predictions["label"] == predictions["prediction"])
    shares = right.pivot_table(index="index", columns="method", values="right", aggfunc="mean")
    if not {METHOD, BASELINE} <= set(shares):
        return
    lead = (shares[METHOD] - shares[BASELINE]).dropna()
    for kind, sign, wrong in (("gained", 1, BASELINE), ("lost", -1, METHOD)):
        ahead = (sign * lead)[sign * lead > 0].sort_values(ascending=False, kind="stable")
        rows = right[(right["method"] == wrong) & ~right["right"]].drop_duplicates("index")
        guess = rows.set_index("index")["prediction"]
        for index in ahead.index[:N_TEST]:
            yield kind, (int(index), int(guess[index]))


def thumbnail(pixels: np.ndarray, side: int = SIDE) -> bytes:
    """An image uint8 [height, width, 3] as WebP of at most ``side`` pixels a side, its shape kept."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=75)
    return buffer.getvalue()
