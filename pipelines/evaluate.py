"""Stage 3: final heads on all training images (Ray tasks), then test images through all of them (Ray Data).

The test split is read here alone, once: image → backbone → features → logits of every head of every
method and seed → predictions. Test features are never stored.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipelines.artifacts import (
    HeadToTrain,
    chosen_from_trials,
    explanations,
    kept,
    predictions,
    read_manifest,
    results,
    thumbnails,
    write_rows,
)
from pipelines.choice import final_heads
from pipelines.head_training import train_heads
from pipelines.model_files import read_head
from pipelines.prediction import stream_predictions
from pipelines.products import Files, Gap, RowFiles, count_rows
from pipelines.results import kept_rows, outcome_of_head, prediction_table, result_rows
from pipelines.schemas import KEPT, RESULTS, THUMBNAILS
from pipelines.session import Advance, Session, Step
from pipelines.streamed_heads import stream_heads
from pipelines.task_data import TaskData
from pipelines.thumbnails import thumbnail_rows


def heads_of_tasks(session: Session) -> dict[str, Files]:
    """The final heads of every task with methods on frozen features; needs the choices of the sweep."""
    products = {name: final_heads(session.run, task) for name, task in session.tasks.items()}
    return {name: product for name, product in products.items() if product.units}


def make_heads(session: Session, missing: Sequence[HeadToTrain], advance: Advance) -> None:
    """Train final heads on stored features, or from the images where none are."""
    make = train_heads if session.config.features.store == "features" else stream_heads
    make(session, missing, advance)


def prediction_products(session: Session) -> list[RowFiles]:
    """The predictions of all final heads of a task for its test images."""
    return [
        predictions(session.tasks[name], "frozen", product.units)
        for name, product in heads_of_tasks(session).items()
    ]


def make_predictions(session: Session, gaps: Sequence[Gap], advance: Advance) -> None:
    """Stream the test images whose predictions are missing through all heads."""
    tables = {
        name: {"frozen": list(product.units.values())} for name, product in heads_of_tasks(session).items()
    }
    stream_predictions(session, gaps, tables, _prediction_table, advance)


def _prediction_table(
    task: TaskData, tag: str, heads: Sequence[HeadToTrain], index: np.ndarray, logits: np.ndarray
) -> pa.Table:
    return prediction_table(task, [(head.point.method, head.seed) for head in heads], index, [*logits])


def result_product(task: TaskData, files: Sequence[str]) -> Files:
    """The result rows of a task, which follow from its heads, their predictions and the choices."""
    keys = [predictions(task, "frozen", files).key, list(chosen_from_trials(task).units)]
    return results(task, "frozen", keys)


def result_products(session: Session) -> list[Files]:
    """The result rows, the kept features per tap and the thumbnails of every task; no stale explanations."""
    return [
        product
        for name, members in heads_of_tasks(session).items()
        for task in [session.tasks[name]]
        for product in (
            result_product(task, list(members.units)), kept(task, members.units),
            *(images(task, predictions(task, "frozen", members.units).key)
              for images in (thumbnails, explanations)),
        )
    ]  # fmt: skip


def make_results(session: Session, tasks: Sequence[str], advance: Advance) -> None:
    """Write the rows of tasks from their heads and predictions, where they are missing."""
    run, heads_of = session.run, heads_of_tasks(session)
    for name in dict.fromkeys(tasks):  # one may lack several
        task, files = session.tasks[name], list(heads_of[name].units)
        tested = predictions(task, "frozen", files)
        (rows_file,), (kept_file,) = result_product(task, files).units, kept(task, files).units
        (images_file,) = thumbnails(task, tested.key).units
        lacking = {file for file in (rows_file, kept_file, images_file) if not run.exists(file)}
        (choices,), manifest = chosen_from_trials(task).units, read_manifest(task, run)
        weights = manifest["backbone"]["loaded"]
        outcomes, counts = [], []
        for file in files if lacking - {images_file} else ():
            head, provenance = read_head(run, file)  # one at a time: on all features it can have gigabytes
            outcomes.append(outcome_of_head(head, provenance, weights, session.config.batch_size))
            counts += kept_rows(task, head)
        if kept_file in lacking:
            write_rows(run, kept_file, KEPT, counts)
        if not lacking - {kept_file}:
            continue
        predicted = run.read_frame(tested.names(run))
        if images_file in lacking:
            write_rows(run, images_file, THUMBNAILS, thumbnail_rows(task, predicted))
        if rows_file in lacking:
            rows = result_rows(task, outcomes, predicted, run.read_frame([choices]), manifest)
            write_rows(run, rows_file, RESULTS, rows)


STEPS = (
    Step("heads", "heads", lambda session: list(heads_of_tasks(session).values()), make_heads),
    Step("evaluate", "predictions", prediction_products, make_predictions, count_rows),
    Step("results", "results", result_products, make_results, brief=True),
)
