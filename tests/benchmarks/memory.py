"""Peak memory of extraction against the number and the size of images: it must not grow.

    python -m tests.benchmarks.memory [--images 1000 4000] [--side 64]
    python -m tests.benchmarks.memory --images 30 60 --side 3500

Runs the command line on made-up images and sums the proportional memory of all its processes, Ray's
included, ten times a second.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table


def write_images(folder: Path, n_images: int, side: int) -> None:
    """A task of noise, as folders of JPEG files of ``side`` pixels a side."""
    generator = np.random.default_rng(0)
    for split, count in (("train", n_images), ("test", 2)):
        for number in range(count):
            of_class = folder / split / str(number % 2)
            of_class.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8))
            coarse.resize((side, side)).save(of_class / f"{number}.jpg")


def session_memory(session: int) -> int:
    """Proportional set size, in bytes, of the processes started since ours that Ray or the run belong to."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if int(process.name) <= session or not (b"ray" in command or b"pipelines" in command):
                continue
            for line in (process / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def peak(n_images: int, side: int, scratch: Path) -> tuple[int, float]:
    """Peak bytes and seconds of extracting ``n_images``."""
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
    started, highest = time.monotonic(), 0
    process = subprocess.Popen([*command, str(scratch / "run")], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        highest = max(highest, session_memory(process.pid - 1))
        time.sleep(0.1)
    assert process.returncode == 0
    return highest, time.monotonic() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--side", type=int, default=64)
    arguments = parser.parse_args()
    table = Table("images", "peak GB of all processes", "seconds")
    for n_images in arguments.images:
        with tempfile.TemporaryDirectory() as scratch:
            highest, seconds = peak(n_images, arguments.side, Path(scratch))
        table.add_row(str(n_images), f"{highest / 1e9:.2f}", f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
