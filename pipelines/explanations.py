"""Why some test images are predicted as they are, for the report: ``h2t report RUN --explain N``.

It takes the images and the backbone, which a report by itself does not. The rows stay in the run directory,
so that later reports show them too.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from rich.console import Console

from h2t.adapter import Adapter
from h2t.device import default_device
from h2t.errors import UserError
from h2t.images.preprocessing import decode
from h2t.images.source import BadImage
from pipelines.artifacts import explanations, predictions, task_columns, write_rows
from pipelines.choice import final_heads
from pipelines.recipe import parse_config
from pipelines.run_directory import RunDirectory
from pipelines.run_record import read_record
from pipelines.schemas import EXPLANATIONS
from pipelines.task_data import TaskData, open_task
from pipelines.thumbnails import thumbnail

METHOD = "head2toe"
SIDE = 144  # pixels of the pictures


def explain_run(run: RunDirectory, count: int, console: Console) -> None:
    """Write explanations of ``count`` predictions of every task; says which tasks cannot be had, and why."""
    record = read_record(run)
    if not record:
        return  # the report itself says that there is nothing
    config = parse_config(record["config"], run.uri)
    for name in [task.name for task in config.tasks]:
        try:
            explain_task(run, open_task(config, name), count)
        except UserError as error:
            console.print(f"{'explain':<9} without {name}: {str(error).splitlines()[0]}", markup=False)


def explain_task(run: RunDirectory, task: TaskData, count: int) -> None:
    """Write the file of a task, unless it is there; those of other images or heads are set aside."""
    heads = final_heads(run, task)
    tested = predictions(task, "frozen", heads.units)
    product = explanations(task, tested.key, count)
    run.archive_all(product.folder, lambda name: name not in product.units, "superseded")
    first = [job.file for job in heads.units.values() if job.point.method == METHOD]
    if not first:
        raise UserError(f"expected {METHOD} among its methods")
    for name in [name for name in product.units if not run.exists(name)]:
        rows = run.read_frame(tested.names(run))
        rows = rows[(rows["method"] == METHOD) & (rows["seed"] == task.config.seeds[0])]
        write_rows(run, name, EXPLANATIONS, explanation_rows(task, run.read(first[0]), rows, count))


def explanation_rows(
    task: TaskData, head: bytes, predicted: pd.DataFrame, count: int
) -> Iterator[dict[str, Any]]:
    """Rows of ``schemas.EXPLANATIONS``; ``predicted``: those of ``schemas.PREDICTIONS`` that the head made.

    An image that cannot be read is left out.
    """
    adapter = Adapter.load(head, default_device())
    for row in in_turn(predicted).head(count).to_dict("records"):
        try:
            pixels = decode(task.read("test", [row["index"]])[0])
        except BadImage:
            continue
        found = adapter.explain(pixels, row["prediction"])
        heat = found.picture(pixels)
        seen = np.asarray(Image.fromarray(pixels).resize(heat.size))
        yield {
            **task_columns(task), "method": row["method"], "seed": row["seed"], "index": row["index"],
            "label": str(adapter.classes[row["label"]]), "prediction": found.label,
            "logit": found.logit, "bias": found.bias, "placeless": found.placeless,
            "taps": list(found.by_tap), "parts": list(found.by_tap.values()),
            "image": thumbnail(seen, SIDE), "heat": thumbnail(np.asarray(heat), SIDE),
        }  # fmt: skip


def in_turn(predicted: pd.DataFrame) -> pd.DataFrame:
    """Predictions, a wrong one and a right one in turn as long as there are both, by the index of images."""
    rows = predicted.sort_values("index").assign(right=lambda rows: rows["label"] == rows["prediction"])
    turn = rows.groupby("right").cumcount()
    return rows.assign(turn=turn).sort_values(["turn", "right"])
