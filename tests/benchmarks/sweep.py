"""The 5-fold sweep of one task at the paper's size through Ray Tune, beside the plain loop.

    python -m tests.benchmarks.sweep [--shorter 10]

1000 made-up rows of 30,440 features in 52 taps, 10 classes, the paper's grid at one target size with
``--shorter`` times fewer steps, one trial at a time on one thread. The plain loop's time follows from its
time per step. Ray's share is the wall time in which no trial trains, against all of it; starting workers and
trials takes as long for any number of steps, so the share at the paper's own steps is given as well.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from tabulate import tabulate

from h2t.features import FeatureLayout
from h2t.heads.spec import Precision
from pipelines import artifacts, sweep
from pipelines.config import Config
from pipelines.feature_files import FeatureTable, write_features
from pipelines.recipe import parse_config
from pipelines.run import run_step
from pipelines.run_directory import RunDirectory
from pipelines.session import Session
from pipelines.task_data import TaskData
from tests.benchmarks.heads import (
    COEFFICIENTS,
    FRACTIONS,
    N_CLASSES,
    N_FEATURES,
    N_TAPS,
    PRECISIONS,
    RATES,
    SCORING_COEFFICIENTS,
    STEPS,
    paper_grid,
    plain_sweep_seconds,
)

N_IMAGES, TARGET_SIZE = 1000, 512


def recipe(folder: Path, shorter: int, precision: Precision) -> Config:
    """A task of images without content: the sweep reads their labels and the feature files alone."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "png")
    for split, count in (("train", N_IMAGES), ("test", 1)):
        labels = np.arange(count) % N_CLASSES
        columns = {"image_bytes": [buffer.getvalue()] * count, "label": labels}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    task = {"name": "made_up", "n_classes": N_CLASSES, "images": {"format": "parquet", "root": str(folder)}}
    grid = {
        "target_size": [TARGET_SIZE],
        "learning_rate": list(RATES),
        "steps": [steps // shorter for steps in STEPS],
        "coefficient": list(COEFFICIENTS),
        "head2toe_coefficient": list(SCORING_COEFFICIENTS),
        "keep_fraction": list(FRACTIONS),
    }
    backbone = {"name": "test_efficientnet", "weights": "random"}
    data = {"name": "sweep", "backbone": backbone, "tasks": [task], "grid": grid, "head_precision": precision}
    return parse_config({**data, "resources": {"concurrent_trials": 1}}, "sweep")


def write_made_up_features(task: TaskData, run: RunDirectory) -> None:
    """The feature files that the extraction would have left."""
    widths = [N_FEATURES // N_TAPS] * (N_TAPS - 1)
    names = (*(f"tap{number}" for number in range(N_TAPS - 1)), "pre_logits")
    layout = FeatureLayout(names, (*widths, N_FEATURES - sum(widths)))
    generator = torch.Generator().manual_seed(0)
    index = np.arange(N_IMAGES)
    taps = [torch.randn(N_IMAGES, width, generator=generator) for width in layout.widths]
    name = artifacts.features(task, "train", TARGET_SIZE).name(0, N_IMAGES)
    table = FeatureTable("test_efficientnet", task.name, "train", TARGET_SIZE, layout, "pre_logits")
    write_features(run, {name: table}, index, index % N_CLASSES, [{TARGET_SIZE: taps}])


def measure(shorter: int, precision: Precision, folder: Path) -> dict[str, str | float]:
    """The wall time of the stage, what of it is training, and the plain loop's."""
    config = recipe(folder, shorter, precision)
    session = Session(config, RunDirectory(str(folder / "run")), Console(quiet=True))
    (task,) = session.tasks.values()
    write_made_up_features(task, session.run)
    _ = session.cluster
    started = time.perf_counter()
    for step in sweep.STEPS:
        run_step(session, step, "sweep")
    wall = time.perf_counter() - started
    rows = artifacts.trials(task).read(session.run)
    training, n_folds = rows["seconds"].sum(), config.cross_validation.n_folds
    plain = plain_sweep_seconds(paper_grid(shorter)) * n_folds
    return {
        "products": precision,
        "settings x folds": len(rows),
        "sweep, s": wall,
        "plain loop, s": plain,
        "times": plain / wall,
        "Ray's share": 1 - training / wall,
        "share at the paper's steps": (wall - training) / (wall - training + training * shorter),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shorter", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(given.shorter, precision, Path(folder)))
    print(tabulate(rows, headers="keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
