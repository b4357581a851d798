"""Images per second of a backbone alone, and with its taps pooled to all target sizes.

Run ``python tests/benchmarks/extraction.py``. Everything runs in one process on one thread; the variants take
turns, so that whatever else the machine does strikes all of them, and ratios are medians over the rounds.
"""

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable

import torch

from h2t.backbones import Backbone, load_backbone
from h2t.taps import TapReader

# backbone, image size in pixels, batch, target sizes, the largest overhead that we promise
CASES = (
    ("efficientnet_lite0", 128, 32, (512, 4096, 16384), 0.30),
    ("resnet50", 240, 8, (512, 8192, 24576), 0.10),
)


def seconds(work: Callable[[], object]) -> float:
    """Processor time, which other programs on the machine disturb less than the clock on the wall."""
    start = time.process_time()
    with torch.inference_mode():
        work()
    return time.process_time() - start


def pooled(backbone: Backbone, targets: tuple[int, ...], images: torch.Tensor) -> float:
    with TapReader(backbone, targets) as reader:
        return seconds(lambda: reader(images))


def measure(
    name: str, size: int, batch: int, targets: tuple[int, ...], limit: float, rounds: int, bfloat16: bool
) -> None:
    backbone = load_backbone(name, weights="random", image_size=size)
    default = load_backbone(name, weights="random", image_size=size)
    default.model.to(memory_format=torch.contiguous_format)
    planes = torch.randn(batch, 3, size, size)
    images = planes.contiguous(memory_format=torch.channels_last)
    variants: dict[str, Callable[[], float]] = {
        "channels last": lambda: seconds(lambda: backbone.model(images)),
        "channels last, pooled": lambda: pooled(backbone, targets, images),
        "channels first": lambda: seconds(lambda: default.model(planes)),
    }
    if bfloat16:
        rough = load_backbone(name, weights="random", image_size=size, dtype="bfloat16")
        variants["bfloat16, pooled"] = lambda: pooled(rough, targets, images)
    times = {variant: [work()] for variant, work in variants.items()}  # the first round warms up
    for _ in range(rounds):
        for variant, work in variants.items():
            times[variant].append(work())
    print(f"\n{name}, {size} px, batches of {batch}, T = {targets}, overhead promised: {limit:.0%}")
    for variant, values in times.items():
        ratios = [a / b for a, b in zip(values[1:], times["channels last"][1:], strict=True)]
        print(
            f"{variant:24} {batch / statistics.median(values[1:]):8.1f} images/s"
            f"   time against channels last: {statistics.median(ratios):.2f}"
        )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bfloat16", action="store_true", help="measure it too; slow where the CPU lacks it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES:
        measure(*case, given.rounds, given.bfloat16)
