"""Peak memory: of extraction, whatever the number and size of images; of a run whose features fill it.

    python -m tests.benchmarks.memory [--images 1000 4000] [--side 64]
    python -m tests.benchmarks.memory --images 30 60 --side 3500
    python -m tests.benchmarks.memory --target-size 24576 --precision float32 float16
    python -m tests.benchmarks.memory --target-size 24576 --methods tap_kernels [--store gram]

The first two extract made-up images, and the peak must not grow. The others run extraction, cross-validation
and evaluation of two real tasks at the paper's largest target size. Proportional memory of all processes of
the command line, Ray's included, is read several times a second.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from tests.pipelines.conftest import commands_of


def write_images(folder: Path, n_images: int, side: int) -> None:
    """A task of noise, as folders of JPEG files of ``side`` pixels a side."""
    generator = np.random.default_rng(0)
    for split, count in (("train", n_images), ("test", 2)):
        for number in range(count):
            of_class = folder / split / str(number % 2)
            of_class.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8))
            coarse.resize((side, side)).save(of_class / f"{number}.jpg")


def memory_by_process(session: int) -> dict[str, int]:
    """Proportional set size, in bytes, of each process of a session, by what Ray calls it and its number."""
    sizes = {}
    for number, command in commands_of(session).items():
        with suppress(OSError):  # it has ended meanwhile
            text = Path(f"/proc/{number}/smaps_rollup").read_text()
            words = command.split() or ["?"]
            title = words[0] if words[0].startswith("ray::") else Path(words[0]).name
            sizes[f"{title} {number}"] = 1024 * int(text.partition("\nPss:")[2].split()[0])
    return sizes


class Peaks:
    """The largest memory that the processes of a command took together, and each kind of them by itself."""

    def __init__(self) -> None:
        self.total, self.of_kind = 0, dict[str, int]()

    def run(self, command: Sequence[str]) -> float:
        """Run a command in a session of its own; seconds."""
        started = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
            while process.poll() is None:
                sizes = memory_by_process(process.pid)
                self.total = max(self.total, sum(sizes.values()))
                for name, size in sizes.items():
                    kind = name.rpartition(" ")[0]
                    self.of_kind[kind] = max(self.of_kind.get(kind, 0), size)
                time.sleep(0.1)
        assert process.returncode == 0
        return time.monotonic() - started


def full_run(
    target_size: int, methods: Sequence[str], store: str, precision: str, scratch: Path
) -> tuple[Peaks, float]:
    """Peaks and seconds of a run of two tasks whose features are as wide as the paper's."""
    overrides = [
        "tasks=[solar_cells, dsprites_loc]", "backbone.image_size=224", f"grid.target_size=[{target_size}]",
        f"features.precision={precision}", f"features.store={store}", f"methods=[{', '.join(methods)}]",
        "grid.learning_rate=[0.1]", "grid.steps=[50]", "grid.keep_fraction=[0.005, 0.02]",
        "cross_validation.n_folds=2", "seeds=[0]",
    ]  # fmt: skip
    command = [sys.executable, "-m", "pipelines", "run", "demo", "--run-dir", str(scratch / "run")]
    for override in overrides:
        command += ["--set", override]
    peaks = Peaks()
    seconds = peaks.run(command)
    return peaks, seconds


def extraction(n_images: int, side: int, scratch: Path) -> tuple[Peaks, float]:
    """Peaks and seconds of extracting ``n_images``."""
    write_images(scratch / "noise", n_images, side)
    task = {"name": "noise", "images": {"format": "folder", "root": str(scratch / "noise")}}
    recipe = {
        "name": "memory",
        "backbone": {"name": "efficientnet_lite0", "image_size": 128},
        "tasks": [task],
        "grid": {"target_size": [512]},
        "cross_validation": {"n_folds": 2},
    }
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "pipelines", "extract", str(scratch / "recipe.yaml"), "--run-dir"]
    peaks = Peaks()
    seconds = peaks.run([*command, str(scratch / "run")])
    return peaks, seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--target-size", type=int)
    parser.add_argument("--precision", nargs="+", default=["float32"])
    parser.add_argument("--methods", nargs="+", default=["linear", "head2toe"])
    parser.add_argument("--store", default="features", choices=["features", "gram"])
    arguments = parser.parse_args()
    table = Table("", "peak GB of all processes", "seconds", "the largest of each kind, GB")
    if arguments.target_size:
        cases = {
            f"T = {arguments.target_size:,}, {precision}": partial(
                full_run, arguments.target_size, arguments.methods, arguments.store, precision
            )
            for precision in arguments.precision
        }
    else:
        cases = {f"{n} images": partial(extraction, n, arguments.side) for n in arguments.images}
    for name, measure in cases.items():
        with tempfile.TemporaryDirectory() as scratch:
            peaks, seconds = measure(Path(scratch))
        largest = sorted(peaks.of_kind.items(), key=lambda pair: -pair[1])[:5]
        kinds = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in largest)
        table.add_row(name, f"{peaks.total / 1e9:.2f}", f"{seconds:.0f}", kinds)
    Console().print(table)


if __name__ == "__main__":
    main()
