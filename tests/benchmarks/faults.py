"""Kill parts of runs at random moments and compare what they leave with an undisturbed run.

    python -m tests.benchmarks.faults [--times 24] [--seed 0]

A small recipe with every stage (frozen methods, training from scratch, a study) is run again and again in
one directory, and something of it is killed at a random moment, until it comes to its end; then the next
directory begins. Faults take turns: SIGKILL of the driver with all of its Ray, of a worker, of the raylet.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import pyarrow.parquet as pq
import yaml
from tabulate import tabulate

from pipelines.run_directory import RunDirectory
from pipelines.status import status
from tests.pipelines.conftest import commands_of, small_config, write_task

FAULTS = ("driver and its Ray", "a worker", "the raylet")
TABLES = ("features", "trials", "chosen", "predictions", "results", "kept", "studies")
MEASURED = ("seconds", "train_seconds", "peak_memory_bytes")


@dataclass
class Seen:
    """What became of one fault: the stages that it struck, and seconds that its run took longer."""

    stages: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    doubled: int = 0
    extra_seconds: list[float] = field(default_factory=list)


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The command line with a Ray of its own, in a session of its own."""
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "run",
        str(folder / "recipe.yaml"),
        "--run-dir",
        str(folder / "run"),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def strike(process: subprocess.Popen[bytes], fault: str, chance: random.Random) -> bool:
    """Kill something of a run; whether there was something to kill."""
    if fault == "driver and its Ray":
        victims = [*commands_of(process.pid)]
    else:
        wanted = "ray::" if fault == "a worker" else "/raylet/raylet"
        victims = [
            pid for pid, command in commands_of(process.pid).items() if wanted in command.split("--")[0]
        ]
        victims = [chance.choice(sorted(victims))] if victims else []
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(victims)


def rows(run: Path) -> dict[str, Counter[str]]:
    """The rows of every table, without what is measured."""
    found: dict[str, Counter[str]] = {}
    for table in TABLES:
        counter: Counter[str] = Counter()
        for file in sorted((run / table).rglob("*.parquet")):
            content = pq.read_table(file)
            content = content.drop_columns([name for name in MEASURED if name in content.column_names])
            counter.update(json.dumps(row, sort_keys=True, default=str) for row in content.to_pylist())
        found[table] = counter
    return found


def stage_now(run: Path) -> str:
    """The stage that is running, by the run directory."""
    if not (run / "run.yaml").exists():
        return "start"
    table, _ = status(RunDirectory(str(run)))
    running = [row.stage for row in table if row.state == "running"]
    return running[0] if running else "between stages"


def disturbed(
    folder: Path, seconds: float, chance: random.Random, faults: Iterator[str], seen: dict[str, Seen]
) -> None:
    """One directory, struck until a run of it comes to its end."""
    struck: list[str] = []
    started = time.monotonic()
    while True:
        process = start(folder)
        moment = time.monotonic() + chance.uniform(0.1, 1) * seconds
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.02)
        fault = next(faults)
        if process.poll() is None and len(struck) < 8:
            stage = stage_now(folder / "run")
            if strike(process, fault, chance):
                seen[fault].stages[stage] += 1
                struck.append(fault)
        process.wait(timeout=600)
        ended_well = process.returncode == 0
        for pid in commands_of(process.pid):  # of a Ray whose driver was killed
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if ended_well:
            break
    extra = (time.monotonic() - started - seconds) / max(1, len(struck))
    for fault in struck:
        seen[fault].extra_seconds.append(extra)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    seen = {fault: Seen() for fault in FAULTS}
    order = iter(lambda: chance.choice(FAULTS), "")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_task(root, "first")
        write_task(root, "second", n_train=30, n_test=9, seed=1)
        config = small_config(
            root, methods=["linear", "head2toe", "scratch"], studies=["relevance-offset"],
            finetune={"learning_rate": [0.1], "steps": [6], "batch_size": 8, "folds": 0,
                      "checkpoint_every": 2},
        )  # fmt: skip
        recipe = yaml.safe_dump(config.model_dump(mode="json"))
        whole = root / "undisturbed"
        whole.mkdir()
        (whole / "recipe.yaml").write_text(recipe)
        started = time.monotonic()
        assert start(whole).wait() == 0
        seconds = time.monotonic() - started
        expected = rows(whole / "run")
        print(f"undisturbed: {seconds:.0f} s, {sum(map(Counter.total, expected.values()))} rows", flush=True)
        number, left = 0, 0
        while sum(fault.stages.total() for fault in seen.values()) < given.times:
            folder = root / f"disturbed-{number}"
            number += 1
            folder.mkdir()
            (folder / "recipe.yaml").write_text(recipe)
            before = {fault: of.stages.total() for fault, of in seen.items()}
            disturbed(folder, seconds, chance, order, seen)
            found = rows(folder / "run")
            lost = sum((expected[table] - found[table]).total() for table in TABLES)
            doubled = sum((found[table] - expected[table]).total() for table in TABLES)
            left += len([*(folder / "run").rglob(".tmp-*")])
            for fault, of in seen.items():
                if of.stages.total() > before[fault]:
                    of.lost += lost
                    of.doubled += doubled
            print(f"directory {number}: {lost} rows lost, {doubled} doubled or other", flush=True)
    table = [
        {
            "SIGKILL of": fault,
            "times": of.stages.total(),
            "in": ", ".join(f"{stage} {count}" for stage, count in sorted(of.stages.items())),
            "rows lost": of.lost,
            "doubled or other": of.doubled,
            "extra seconds": mean(of.extra_seconds) if of.extra_seconds else 0.0,
        }
        for fault, of in seen.items()
    ]
    print(tabulate(table, headers="keys", floatfmt=".0f"))
    print(f"{left} temporary files were left in {number} directories")


if __name__ == "__main__":
    main()
