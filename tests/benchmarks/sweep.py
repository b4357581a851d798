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
from pipelines.cluster import Cluster, connect
from pipelines.config import Config
from pipelines.feature_files import write_features
from pipelines.recipe import parse_config
from pipelines.run_directory import RunDirectory
from pipelines.sweep import sweep
from pipelines.task_data import TaskData, open_tasks
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
    plain_sweep_seconds,
    sweep_settings,
)

N_IMAGES, TARGET_SIZE = 1000, 512


def recipe(folder: Path, shorter: int, dtype: Precision) -> Config:
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
    data = {"name": "sweep", "backbone": backbone, "tasks": [task], "grid": grid, "head_dtype": dtype}
    return parse_config({**data, "resources": {"concurrent_trials": 1}}, "sweep")


def write_made_up_features(work: TaskData, run: RunDirectory) -> None:
    """The feature files that the extraction would have left."""
    widths = [N_FEATURES // N_TAPS] * (N_TAPS - 1)
    names = (*(f"tap{number}" for number in range(N_TAPS - 1)), "pre_logits")
    layout = FeatureLayout(names, (*widths, N_FEATURES - sum(widths)))
    generator = torch.Generator().manual_seed(0)
    for shard in work.shards("train"):
        index = np.array(shard.indices)
        taps = [torch.randn(len(index), width, generator=generator) for width in layout.widths]
        names_of_files = {TARGET_SIZE: work.feature_file(shard, TARGET_SIZE)}
        write_features(
            run, names_of_files, {TARGET_SIZE: layout}, index, index % N_CLASSES, [{TARGET_SIZE: taps}]
        )


def measure(cluster: Cluster, shorter: int, dtype: Precision, folder: Path) -> dict[str, str | float]:
    """The wall time of the stage, what of it is training, and the plain loop's."""
    config = recipe(folder, shorter, dtype)
    works, run = open_tasks(config), RunDirectory(str(folder / "run"))
    write_made_up_features(works[0], run)
    started = time.perf_counter()
    sweep(config, works, run, cluster, Console(quiet=True))
    wall = time.perf_counter() - started
    rows = run.read_frame(trial.file for trial in works[0].trials())
    training, n_folds = rows["seconds"].sum(), config.cross_validation.n_folds
    plain = plain_sweep_seconds(sweep_settings(shorter)) * n_folds
    return {
        "products": dtype,
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
    for dtype in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(connect(), given.shorter, dtype, Path(folder)))
    print(tabulate(rows, headers="keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
