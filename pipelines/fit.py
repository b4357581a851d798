"""From a folder of labelled images to an adapter and what it is worth: ``h2t fit``.

A recipe is made and run as any other: its run directory holds everything, and ``run.yaml`` in it the recipe.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from h2t.adapter import WeightType, class_names, convert_head, load_head
from h2t.backbones.loading import input_config
from h2t.errors import UserError
from h2t.images.formats import ROOTED
from h2t.images.huggingface import is_saved_dataset
from h2t.images.parquet import has_images
from h2t.images.remote import list_files, list_folders, open_root
from h2t.statistics import Estimate, accuracy_estimate, paired_difference
from pipelines.config import Config
from pipelines.recipe import apply_override, parse_config
from pipelines.run_directory import RunDirectory
from pipelines.task_data import open_task

METHODS = ("linear", "head2toe")
GRID = {
    "target_size": [512],
    "learning_rate": [0.1, 0.01],
    "steps": [500],
    "coefficient": [1e-5],
    "head2toe_coefficient": [1e-3, 1e-5],
    "keep_fraction": [0.005, 0.01, 0.02, 0.05, 0.1, 0.2],
}
"""What is tried: the paper's rates and fractions at one target size and 500 steps."""


def name_of(images: str) -> str:
    """A name for the task and its files: that of the folder or file."""
    last = re.split(r"[?]", images)[0].rstrip("/").rpartition("/")[2] or Path(images).resolve().name
    for ending in (".parquet", ".csv"):
        last = last.removesuffix(ending)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-.") or "images"


def format_of(images: str) -> str:
    """The format of what lies at a path or URI, by the names of its files."""
    filesystem, path = open_root(images)
    if path.lower().endswith(".csv"):
        return "table"
    if path.lower().endswith(".parquet") and not has_images(images, path):
        return "table"
    if is_saved_dataset(filesystem, path):
        return "huggingface"
    names = [path, *list_files(filesystem, path, recursive=False)]
    for folder in list_folders(filesystem, path):
        names += list_files(filesystem, f"{path}/{folder}", recursive=False)
    for ending, format in ((".parquet", "parquet"), (".tar", "webdataset")):
        if any(name.lower().endswith(ending) for name in names):
            return format
    return "folder"


def recipe(
    images: str,
    backbone: str,
    image_size: int | None = None,
    format: str | None = None,
    max_depth: float | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """The recipe of a fit. Raises UserError for an unknown format or backbone, among others.

    With ``max_depth``, a share of a forward pass, there is no linear probe, which reads the end of it.
    """
    name = name_of(images)
    input_config(backbone, image_size)  # before anything is written
    if format is not None and format not in ROOTED:
        raise UserError(f"--format: expected one of {', '.join(ROOTED)}, got '{format}'")
    task = {
        "name": name,
        "group": "natural",
        "title": name,
        "images": {"format": format or format_of(images), "root": images},
    }
    data: dict[str, Any] = {
        "name": f"fit-{name}",
        "backbone": {"name": backbone, "image_size": image_size, "max_depth": max_depth},
        "tasks": [task],
        "methods": list(METHODS) if max_depth is None else ["head2toe"],
        "grid": GRID,
        "cross_validation": {"scheme": "shuffled"},
        "seeds": [0],
    }
    for override in overrides:
        apply_override(data, override)
    return parse_config(data, images)


def rare_classes(config: Config) -> list[str]:
    """What cross-validation and the held-out images cannot say of classes with few images, in words."""
    task = open_task(config, config.tasks[0].name)
    source, _ = task.sources["train"]
    names = source.class_names() or tuple(map(str, range(task.n_classes)))
    train, test = (
        np.bincount(labels[labels >= 0], minlength=len(names))
        for labels in (task.labels["train"], task.labels["test"])
    )
    said = []
    for name, n_train, n_test in zip(names, train.tolist(), test.tolist(), strict=True):
        if n_train == 1:
            said.append(f"{name} has 1 image to train on: no fold can train on it and be tested with it")
        elif n_train < config.cross_validation.n_folds:
            said.append(f"{name} has {n_train} images to train on, fewer than there are folds")
        if n_test == 0:
            said.append(f"{name} has no held-out image: it is no part of the held-out accuracy")
    return said


@dataclass(frozen=True)
class Fitted:
    """What a method came to: accuracy in cross-validation and on held-out images, and its saved head."""

    method: str
    validation_accuracy: float
    held_out: Estimate
    n_test: int
    n_kept: int
    file: str


def fitted(run: RunDirectory) -> list[Fitted]:
    """What the run of a fit came to, one entry per method."""
    found, heads = [], run.keyed_names("heads", ".safetensors", recursive=True)
    for row in _rows(run, "results").to_dict("records"):
        beginning = f"{row['method']}-seed-{row['seed']}-"
        (file,) = [name for name in heads if name.rpartition("/")[2].startswith(beginning)]
        held_out = accuracy_estimate((np.arange(row["n_test"]) < row["n_correct"])[None])
        found.append(
            Fitted(row["method"], row["validation_accuracy"], held_out, row["n_test"], row["n_kept"], file)
        )
    return sorted(found, key=lambda each: METHODS.index(each.method))


def difference(run: RunDirectory) -> Estimate:
    """Held-out accuracy of Head2Toe minus that of the linear probe, on the same images."""
    rows = _rows(run, "predictions").sort_values("index")
    first, second = (
        (of := rows[rows["method"] == method])["prediction"].to_numpy() == of["label"].to_numpy()
        for method in reversed(METHODS)
    )
    return paired_difference(first[None], second[None])


def best(found: list[Fitted]) -> Fitted:
    """The one that cross-validation prefers; held-out images have no say."""
    return max(found, key=lambda each: each.validation_accuracy)


def _rows(run: RunDirectory, kind: str) -> pd.DataFrame:
    return run.read_table(run.keyed_names(kind, ".parquet", recursive=True)).to_pandas()


def save_adapter(run: RunDirectory, chosen: Fitted, out: str, weights: WeightType) -> None:
    """Write the adapter, and the model card beside it (``.md``), each whole or not at all."""
    destination, name = RunDirectory.around(out)
    data = run.read(chosen.file)
    with destination.writing(name) as sink:
        convert_head(data, sink, weights)
    (row,) = _rows(run, "results").query(f"method == '{chosen.method}'").to_dict("records")
    destination.write(f"{name.removesuffix('.safetensors')}.md", model_card(data, row, chosen, name).encode())


def model_card(data: bytes, row: dict[Any, Any], chosen: Fitted, name: str) -> str:
    """What is in an adapter, how good it is and how to use it, as Markdown; ``row``: its row of results."""
    head, provenance = load_head(data)
    section, classes = json.loads(provenance["backbone"]), class_names(data)
    low, high = 100 * chosen.held_out.low, 100 * chosen.held_out.high
    point, depths = head.hyperparameters, [section["max_depth"]] if "max_depth" in section else []
    lines = [
        f"# {name}",
        "",
        f"A linear head on features of a frozen `{section['name']}`, for {len(classes)} classes: "
        f"{', '.join(map(str, classes[:20]))}{' …' if len(classes) > 20 else ''}.",
        "",
        "| | |",
        "|---|---|",
        f"| held-out accuracy | {100 * chosen.held_out.mean:.1f} % ({low:.1f} to {high:.1f}, with 95 % "
        f"confidence), {chosen.n_test} images |",
        f"| accuracy in cross-validation | {100 * chosen.validation_accuracy:.1f} % |",
        f"| method | {chosen.method}: {len(head.kept):,} of {head.layout.n_features:,} features kept, from "
        f"{len(head.taps_read())} of {len(head.layout.taps)} taps; target size {point.target_size}, rate "
        f"{point.learning_rate:g}, {point.steps} steps, coefficient {point.coefficient:g} |",
        f"| training images | {row['n_train']}, {row['image_source']} |",
        f"| preprocessing | {row['preprocessing']} |",
        f"| weights of the backbone | {row['weights']} |",
        *(f"| forward pass | ends within {depth:.0%} of its multiply-adds |" for depth in depths),
        "",
        "Licences of the images and of the backbone's weights are those of their publishers; this file holds",
        "neither.",
        "",
        "```sh",
        f"h2t predict {name} photos/*.jpg",
        "```",
        "",
        "```python",
        "from h2t import Adapter",
        "",
        f'Adapter.load("{name}").predict(["photo.jpg"]).labels',
        "```",
        "",
    ]  # fmt: skip
    return "\n".join(lines)
