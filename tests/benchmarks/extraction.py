"""Images per second of a backbone alone, with its taps pooled to all target sizes, and written as well.

    python -m tests.benchmarks.extraction [--rounds 7] [--bfloat16]

Everything runs in one process with one thread for the backbone and one that writes; the variants take turns,
so that whatever else the machine does strikes all of them, and ratios are medians over the rounds. Processor
time is what the work costs; wall time is what it takes where a second core writes while the first computes.
"""

import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from tabulate import tabulate

from h2t.backbones.loading import Backbone, load_backbone
from h2t.backbones.tap_reader import TapReader, feature_layout
from h2t.device import slow_in_bfloat16
from pipelines.feature_files import FeatureTable, write_features
from pipelines.run_directory import RunDirectory

# backbone, image size in pixels, images in a batch, target sizes, the largest overhead that was asked for
CASES = (
    ("efficientnet_lite0", 128, 32, (512, 4096, 16384), 0.30),
    ("resnet50", 240, 8, (512, 8192, 24576), 0.10),
)
BATCHES = 8
Times = tuple[float, float]


def seconds(function: Callable[[], object]) -> Times:
    """Processor and wall time."""
    processor, wall = time.process_time(), time.perf_counter()
    with torch.inference_mode():
        function()
    return time.process_time() - processor, time.perf_counter() - wall


def forward(model: torch.nn.Module, images: torch.Tensor) -> None:
    for _ in range(BATCHES):
        model(images)


def pooled(backbone: Backbone, targets: tuple[int, ...], images: torch.Tensor) -> Times:
    with TapReader(backbone, targets) as reader:
        return seconds(lambda: [reader(images) for _ in range(BATCHES)] and None)


def written(backbone: Backbone, targets: tuple[int, ...], images: torch.Tensor, folder: str) -> Times:
    rows = np.zeros(len(images) * BATCHES, np.int32)
    keys = (backbone.name, "benchmark", "train")
    tables = {
        f"{size}.parquet": FeatureTable(*keys, size, feature_layout(backbone, size), backbone.embedding)
        for size in targets
    }
    with TapReader(backbone, targets) as reader:
        batches = (reader(images) for _ in range(BATCHES))
        return seconds(lambda: write_features(RunDirectory(folder), tables, rows, rows, batches))


def measure(
    name: str, size: int, batch: int, targets: tuple[int, ...], limit: float, rounds: int, bfloat16: bool
) -> None:
    backbone = load_backbone(name, weights="random", image_size=size)
    default = load_backbone(name, weights="random", image_size=size)
    default.model.to(memory_format=torch.contiguous_format)
    planes = torch.randn(batch, 3, size, size)
    images = planes.contiguous(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        variants: dict[str, Callable[[], Times]] = {
            "backbone alone": lambda: seconds(lambda: forward(backbone.model, images)),
            "pooled": lambda: pooled(backbone, targets, images),
            "pooled and written": lambda: written(backbone, targets, images, folder),
            "backbone alone, channels first": lambda: seconds(lambda: forward(default.model, planes)),
        }
        if bfloat16:
            rough = load_backbone(name, weights="random", image_size=size, precision="bfloat16")
            variants["pooled, bfloat16"] = lambda: pooled(rough, targets, images)
        times = {variant: [measured()] for variant, measured in variants.items()}  # the first round warms up
        for _ in range(rounds):
            for variant, measured in variants.items():
                times[variant].append(measured())
    rows, alone = [], times["backbone alone"][1:]
    for variant, values in times.items():
        processor, wall = (
            median(mine[clock] / base[clock] for mine, base in zip(values[1:], alone, strict=True))
            for clock in (0, 1)
        )
        speed = batch * BATCHES / median(wall for _, wall in values[1:])
        rows.append(
            {"": variant, "images/s": speed, "processor time": processor, "wall time": wall},
        )
    title = f"{name}, {size} px, batches of {batch}, T = {targets}, overhead asked for: {limit:.0%}"
    print(f"\n{title}", tabulate(rows, headers="keys", floatfmt=".3g"), sep="\n", flush=True)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bfloat16", action="store_true", help="measure it too, where the processor has it")
    given = parser.parse_args()
    given.bfloat16 = given.bfloat16 and not slow_in_bfloat16()
    torch.set_num_threads(1)
    for case in CASES:
        measure(*case, given.rounds, given.bfloat16)
