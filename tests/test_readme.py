"""The README's commands, recipes and code: all are understood, and those of a newcomer are run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from typer.main import get_command

from pipelines.cli import app
from pipelines.recipe import parse_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADINGS = re.split(r"^##+ (.+)$", README, flags=re.MULTILINE)
SECTIONS = dict(zip(HEADINGS[1::2], HEADINGS[2::2], strict=True))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of each command of ``h2t``, lines that go on put together."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|[ /])(h2t .*)", line) for line in lines]
    return [shlex.split(match.group(1), comments=True)[1:] for match in found if match]


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_every_command_is_one(words: list[str]) -> None:
    if "|" in words[0]:  # a choice of stages
        words = [words[0].split("|")[0], *words[1:]]
    group: Any = get_command(app)
    name, command, rest = group.resolve_command(group.make_context("h2t", list(words)), words)
    command.make_context(name, rest)


@pytest.mark.parametrize("recipe", blocks(README, "yaml"))
def test_every_recipe_is_one(recipe: str) -> None:
    assert parse_config(YAML(typ="safe", pure=True).load(recipe), "README").tasks


def test_every_benchmark_is_there() -> None:
    for name in re.findall(r"python -m tests\.benchmarks\.(\w+)", README):
        assert (ROOT / "tests" / "benchmarks" / f"{name}.py").exists()
    for file in (ROOT / "tests" / "benchmarks").glob("[a-z]*.py"):
        assert f"tests.benchmarks.{file.stem}" in README


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_newcomer_adapts_a_backbone_and_reads_the_results(tmp_path: Path) -> None:
    """The commands and the code of their section as they stand, and the ways to read a run."""
    random = np.random.default_rng(0)
    for name, colour in {"oak": (200, 60, 40), "elm": (60, 60, 200), "fir": (90, 180, 90)}.items():
        folder = tmp_path / "data" / "leaves" / name
        folder.mkdir(parents=True)
        for number in range(20):
            pixels = np.clip(np.array(colour) + random.normal(0, 60, (60, 70, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "leaf.png")
    environment = {"PYTHONPATH": str(ROOT)}
    section = SECTIONS["Adapt it to your images"]
    for words in commands(section):
        run([sys.executable, "-m", "pipelines", *words], tmp_path, environment)
    for file in ("leaves.safetensors", "leaves.md", "leaves.onnx", "predictions.parquet", "why.png"):
        assert (tmp_path / file).stat().st_size
    (code,) = blocks(section, "python")
    run([sys.executable, "-c", code], tmp_path, environment)
    (tmp_path / "runs" / "demo").symlink_to(tmp_path / "runs" / "fit-leaves")
    reading = SECTIONS["Read the results"]
    (code,), (query,) = blocks(reading, "python"), blocks(reading, "sql")
    imports = "import duckdb, pandas, polars, pyarrow.dataset, pyarrow.parquet\n"
    run([sys.executable, "-c", f"{imports}{code}\nduckdb.sql({query!r}).fetchall()"], tmp_path, environment)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
