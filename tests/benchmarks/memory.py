"""Peak memory of extraction against the number of images: it must not grow.

    python -m tests.benchmarks.memory [--images 1000 4000]

Runs the command line on made-up 64-pixel images and sums the proportional memory of all its processes, Ray's
included, every half second.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table


def write_images(folder: Path, n_images: int) -> None:
    """A task of noise, as Parquet with PNG bytes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", n_images), ("test", 2)):
        encoded = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "png")
            encoded.append(buffer.getvalue())
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.table({"image_bytes": encoded, "label": np.arange(count) % 2}), folder / f"{split}.parquet"
        )


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


def peak(n_images: int, scratch: Path) -> tuple[int, float]:
    """Peak bytes and seconds of extracting ``n_images``."""
    write_images(scratch / "noise", n_images)
    task = {"name": "noise", "images": {"format": "parquet", "root": str(scratch / "noise")}}
    recipe = {
        "name": "memory",
        "backbone": {"name": "efficientnet_lite0", "image_size": 128},
        "tasks": [task],
        "grid": {"target_size": [512]},
    }
    (scratch / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "pipelines", "extract", str(scratch / "recipe.yaml"), "--run-dir"]
    started, highest = time.monotonic(), 0
    process = subprocess.Popen([*command, str(scratch / "run")], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        highest = max(highest, session_memory(process.pid - 1))
        time.sleep(0.5)
    assert process.returncode == 0
    return highest, time.monotonic() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 4000])
    table = Table("images", "peak GB of all processes", "seconds")
    for n_images in parser.parse_args().images:
        with tempfile.TemporaryDirectory() as scratch:
            highest, seconds = peak(n_images, Path(scratch))
        table.add_row(str(n_images), f"{highest / 1e9:.2f}", f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
