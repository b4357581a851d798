"""Feature files: which encoding, how large, and how fast a matrix is read back.

    python -m tests.benchmarks.features RUN_DIRECTORY TASK TARGET_SIZE [--large]

The first table encodes real features of a finished run in several ways. The second reads a matrix back and
compares that with plain pyarrow reading the same files, by turns.
``--large`` does that for 1000 x 467,688 as well (2 GB), values drawn like activations (half zeros).
"""

import argparse
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from h2t.features import FeatureLayout
from pipelines.feature_files import KEYS, FeatureTable, read_features, write_features
from pipelines.run_directory import RunDirectory

ENCODINGS = {
    "none": {"compression": "none"},
    "snappy": {"compression": "snappy"},
    "lz4": {"compression": "lz4"},
    "zstd 1": {"compression": "zstd", "compression_level": 1},
    "lz4 + split": {"compression": "lz4", "split": True},
    "zstd 1 + split": {"compression": "zstd", "compression_level": 1, "split": True},
}


def seconds(functions: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median wall time of each; they take turns, after a round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: median(values[1:]) for name, values in times.items()}


def encode(
    table: pa.Table, compression: str, compression_level: int | None = None, split: bool = False
) -> bytes:
    """A table as Parquet in memory."""
    columns = [f"{name}.list.element" for name in table.column_names[len(KEYS) :]] if split else False
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression=compression,
        compression_level=compression_level,
        use_dictionary=False,
        write_statistics=False,
        use_byte_stream_split=columns,
    )
    return sink.getvalue()


def decode(data: bytes) -> pa.Table:
    """The table again."""
    return pq.read_table(pa.BufferReader(data), use_threads=False)


def with_nulls_allowed(table: pa.Table) -> pa.Table:
    """The same columns as pyarrow declares them when nothing is said."""
    taps = [
        pa.field(field.name, pa.list_(pa.float32(), field.type.list_size))
        for field in list(table.schema)[len(KEYS) :]
    ]
    return table.cast(pa.schema([*(pa.field(name, kind) for name, kind in KEYS.items()), *taps]))


def encodings(declared: pa.Table, raw: int) -> Table:
    """Size, and speed of writing and reading, of each encoding."""
    shown = Table("encoding", "bytes / raw", "write MB/s of raw", "read MB/s of raw")
    variants = {name: (declared, options) for name, options in ENCODINGS.items()}
    variants["none, nulls allowed"] = with_nulls_allowed(declared), ENCODINGS["none"]
    data = {name: encode(table, **options) for name, (table, options) in variants.items()}
    writing = seconds(
        {name: partial(encode, table, **options) for name, (table, options) in variants.items()}
    )
    reading = seconds({name: partial(decode, encoded) for name, encoded in data.items()})
    for name, encoded in data.items():
        speeds = (f"{raw / times[name] / 1e6:.0f}" for times in (writing, reading))
        shown.add_row(name, f"{len(encoded) / raw:.2f}", *speeds)
    return shown


def reading(run: RunDirectory, names: list[str], title: str, rounds: int = 5) -> Table:
    """Reading a matrix against plain pyarrow, each in a process of its own, as a trial reads it."""
    matrix = read_features(run, names)
    raw = matrix.values.nbytes
    size = sum(len(run.read(name)) for name in names)
    del matrix
    seen = [[timed_alone(way, run.uri, names) for way in ("plain", "matrix")] for _ in range(rounds)]
    plain, to_matrix = (median(times) for times in zip(*seen, strict=True))
    ratio = median(first / second for first, second in seen)
    shown = Table(title, "seconds", "of plain pyarrow's speed")
    shown.add_row(
        f"plain pyarrow, {raw / 1e6:.0f} MB raw, {size / raw:.2f} of it on disk", f"{plain:.2f}", "1"
    )
    shown.add_row("to one matrix", f"{to_matrix:.2f}", f"{ratio:.2f}")
    return shown


def timed_alone(*arguments: object) -> float:
    """Seconds of :func:`timed` in a new process: one that has read before would have the memory already."""
    call = f"from tests.benchmarks.features import timed; timed{arguments}"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    return float(done.stdout)


def timed(way: str, uri: str, names: list[str]) -> None:
    """Print the seconds that reading takes: plainly, or to a matrix."""
    run, started = RunDirectory(uri), time.perf_counter()
    read = run.read_table(names) if way == "plain" else read_features(run, names)
    print(time.perf_counter() - started, flush=True)
    del read


def write_large(
    run: RunDirectory, n_images: int = 1000, n_features: int = 467_688, shard: int = 250, batch: int = 50
) -> list[str]:
    """Feature files of 52 taps with values drawn like activations."""
    layout = FeatureLayout(tuple(f"tap{i}" for i in range(52)), (8994,) * 52)
    assert layout.n_features == n_features
    names, generator = [], torch.Generator().manual_seed(0)
    for start in range(0, n_images, shard):
        batches = (
            {512: [torch.randn(batch, width, generator=generator).clamp_(min=0) for width in layout.widths]}
            for _ in range(shard // batch)
        )
        rows = np.arange(start, start + shard)
        names.append(f"part-{start}.parquet")
        table = FeatureTable("backbone", "task", "train", 512, layout, "tap51")
        write_features(run, {names[-1]: table}, rows, rows % 10, batches)
    return names


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_directory")
    parser.add_argument("task")
    parser.add_argument("target_size", type=int)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    run, console = RunDirectory(options.run_directory), Console()
    folder = f"/target-size-{options.target_size}/{options.task}/train/"
    names = [name for name in run.names("features", recursive=True) if folder in name]
    table = run.read_table(names)
    raw = sum(table[name].nbytes for name in table.column_names)
    console.print(encodings(table, raw))
    console.print(reading(run, names, f"{options.task}, T = {options.target_size}"))
    if options.large:
        with tempfile.TemporaryDirectory() as scratch:
            large = RunDirectory(scratch)
            console.print(reading(large, write_large(large), "1000 x 467,688"))


if __name__ == "__main__":
    main()
