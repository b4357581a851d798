"""Tap kernels against Head2Toe and its rivals, on the same features and folds: accuracy, time and memory.

    python -m tests.benchmarks.tap_kernels [--tasks mnist scene_count] [--methods head2toe tap_kernels]
        [--grid vtab1k-resnet50] [--folds 5] [--folder FOLDER]

Ten tasks of 1000 training images each, on the demo's backbone at T = 512. Four are the demo's, on which the
method was made, by cross-validation on their training images. Six had no part in that: scale and shape of
the demo's sprites, the type of its solar cells, scikit-learn's digits, and made-up scenes of shapes, in the
spirit of CLEVR, with the number of objects and the distance of the nearest as labels.

Every method is cross-validated on folds of the training images and trained again on all of them, in a
process of its own with one thread: seconds are those of all that, memory is the process's highest less what
the features take. Methods that have a grid get that of ``--grid`` at T = 512: the demo's, or the paper's,
which takes hours. The kernel ridge regressions of himalaya (pip install himalaya), an outside rival, choose
by its own cross-validation, and are left out where it is not installed. Features and results stay in
``--folder``; what is there is not done again.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from rich.console import Console
from tabulate import tabulate

from h2t.backbones.loading import load_backbone
from h2t.backbones.tap_reader import feature_layout
from h2t.device import use_threads
from h2t.extraction import extract_features
from h2t.features import FeatureLayout, unit_norm
from h2t.folds import folds
from h2t.head2toe import fit, logits
from h2t.heads.solution import Problem
from h2t.heads.tap_kernels import tap_products
from h2t.images import demo, sprites
from h2t.methods import METHODS, search_space

TARGET_SIZE, N_TRAIN = 512, 1000
IMAGES = {
    "mnist": "mnist", "solar_cells": "solar_cells", "dsprites_loc": "sprites", "dsprites_ori": "sprites",
    "dsprites_scale": "sprites", "dsprites_shape": "sprites", "solar_type": "solar_cells",
    "digits": "digits", "scene_count": "scenes", "scene_distance": "scenes",
}  # fmt: skip
"""Task -> its images. The first four are the demo's."""
DEVELOPED_ON = tuple(IMAGES)[:4]
HIMALAYA = ("himalaya_kernels", "himalaya_groups")
"""Random search over kernels' weights, and over groups' penalties: the same model, by features and slower."""
METHODS_SHOWN = ("linear", "all_ridge", "all_logistic", "head2toe", "tap_kernels", "tap_kernels_kept")
SIDE = 128
DISTANCES = (1.0, 4.0)
FURTHEST = 8.0
COUNTS = (3, 10)


def scene(generator: np.random.Generator) -> tuple[np.ndarray, int, float]:
    """A scene of shapes that are smaller and higher up the further they are.

    uint8 [128, 128, 3], the number of objects, and the distance of the nearest.
    """
    low, high = generator.integers(90, 200, 2)
    shades = np.linspace(low, high, SIDE)[:, None, None] + generator.normal(0, 4, (SIDE, SIDE, 1))
    image = Image.fromarray(np.repeat(shades.clip(0, 255).astype(np.uint8), 3, axis=2))
    draw = ImageDraw.Draw(image)
    n_objects = int(generator.integers(COUNTS[0], COUNTS[1] + 1))
    nearest = generator.uniform(*DISTANCES)
    further = generator.uniform(nearest, FURTHEST, n_objects - 1)
    for distance in sorted([nearest, *further], reverse=True):
        radius = generator.uniform(0.8, 1.2) * 22 / (0.5 + distance)
        x = generator.uniform(radius, SIDE - radius)
        y = 24 + 80 / distance**0.5 + generator.normal(0, 4)
        colour = tuple(generator.integers(0, 256, 3).tolist())
        corners = [4, 3, 40][generator.integers(3)]
        turn = generator.uniform(0, 2 * np.pi) + np.linspace(0, 2 * np.pi, corners, endpoint=False)
        outline = np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], 1)
        draw.polygon([tuple(point) for point in outline.tolist()], fill=colour, outline=(20, 20, 20))
    return np.asarray(image), n_objects, float(nearest)


def scenes(n_images: int) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Scenes and their labels: counts of 3 to 10, and six equal ranges of the distance."""
    generator = np.random.default_rng(7)
    images, counts, nearest = zip(*(scene(generator) for _ in range(n_images)), strict=True)
    edges = np.linspace(*DISTANCES, 7)[1:-1]
    labels = {"scene_count": np.array(counts) - COUNTS[0], "scene_distance": np.digitize(nearest, edges)}
    return list(images), labels


def images_and_labels(name: str) -> tuple[list, dict[str, np.ndarray]]:  # type: ignore[type-arg]
    """Images of a kind, the training images first, and the labels of every task that they have."""
    positions = np.arange(2 * N_TRAIN)
    if name == "scenes":
        return scenes(len(positions))
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(7).permutation(len(digits.target))
        grey = (digits.images[order] * 255 / 16).astype(np.uint8)
        return list(np.repeat(grey[..., None], 3, axis=3)), {"digits": digits.target[order]}
    if name == "sprites":
        latents = demo._sprite_latents()[positions]
        columns = {"dsprites_scale": "scale", "dsprites_shape": "shape"}
        labels = {task: latents[:, sprites.LATENTS.index(column)] for task, column in columns.items()}
        tasks = ("dsprites_loc", "dsprites_ori")
        images = demo.BUNDLED["dsprites_loc"].images(positions)
    else:
        labels, tasks = {}, (name,)
        images = demo.BUNDLED[name].images(positions)
    labels |= {task: demo.BUNDLED[task].labels(positions) for task in tasks}
    if name == "solar_cells":
        lines = (demo._package_folder(name) / "data" / "labels.csv").read_text().splitlines()
        kinds = {line.split()[0]: int(line.split()[2] == "poly") for line in lines}
        labels["solar_type"] = np.array([kinds[path] for path in demo._solar_cells()[0][positions]])
    return images, labels


def prepare(folder: Path, name: str) -> None:
    """Write features and labels of a kind of images, unless they are there."""
    labels_file = folder / f"{name}-labels.json"
    if labels_file.exists():
        return
    images, labels = images_and_labels(name)
    backbone = load_backbone("efficientnet_lite0", image_size=SIDE)
    layout = feature_layout(backbone, TARGET_SIZE)
    np.save(folder / f"{name}.npy", extract_features(backbone, images, TARGET_SIZE))
    (folder / "layout.json").write_text(json.dumps([layout.taps, layout.widths]))
    labels_file.write_text(json.dumps({task: values.tolist() for task, values in labels.items()}))


class Data:
    """The features of a task, float32 [n, n_features], of which the first N_TRAIN rows are for training."""

    def __init__(self, folder: Path, task: str) -> None:
        self.features = np.load(folder / f"{IMAGES[task]}.npy")
        self.labels = np.array(json.loads((folder / f"{IMAGES[task]}-labels.json").read_text())[task])
        taps, widths = json.loads((folder / "layout.json").read_text())
        self.layout = FeatureLayout(tuple(taps), tuple(widths))
        self.n_classes = int(self.labels.max()) + 1


def by_method(data: Data, method: str, grid: dict[str, list[float]], n_folds: int) -> dict[str, object]:
    """Accuracy on the folds and on the test images of a method of the library."""
    points = search_space(method, SimpleNamespace(**grid))
    train, labels = data.features[:N_TRAIN], data.labels[:N_TRAIN]
    options: dict[str, Any] = {"n_classes": data.n_classes, "embedding": "pre_logits"}
    if METHODS[method].by_tap:  # as a run has it: products of all images first, of which each fold takes some
        whole = Problem.of(unit_norm(train, data.layout), labels, data.n_classes, data.layout)
        known = [tap_products(whole, tap) for tap in range(len(data.layout.taps))]
        options["products"] = known.__getitem__
    right: dict[object, list[float]] = {point: [] for point in points}
    for rows, held in folds(N_TRAIN, n_folds):
        for head in fit(train, labels, data.layout, points, rows=rows, **options):
            right[head.hyperparameters].append((logits(head, train[held]).argmax(1) == labels[held]).mean())
    best = max(points, key=lambda point: np.mean(right[point]))
    (head,) = fit(train, labels, data.layout, [best], **options)
    predicted = logits(head, data.features[N_TRAIN:]).argmax(1)
    return {
        "validation": float(np.mean(right[best])),
        "test": float((predicted == data.labels[N_TRAIN:]).mean()),
        "points": len(points),
        "kept": len(head.kept),
    }


def by_himalaya(data: Data, method: str, n_folds: int) -> dict[str, object]:
    """Test accuracy of himalaya's regressions of the one-hot labels, on features as tap kernels have them."""
    from himalaya.kernel_ridge import MultipleKernelRidgeCV
    from himalaya.ridge import GroupRidgeCV

    rows = unit_norm(data.features, data.layout)
    rows -= rows[:N_TRAIN].mean(0)
    for columns in data.layout.slices:
        spread = np.square(rows[:N_TRAIN, columns]).sum(1).mean()
        rows[:, columns] /= np.sqrt(spread) if spread > 1e-8 else 1.0
    targets = np.eye(data.n_classes, dtype=np.float32)[data.labels[:N_TRAIN]]
    targets -= targets.mean(0)
    solver = {"n_iter": 20, "progress_bar": False, "alphas": np.logspace(-4, 4, 9)}
    if method == "himalaya_kernels":
        parts = [rows[:, columns] for columns in data.layout.slices]
        kernels = np.stack([part @ part[:N_TRAIN].T for part in parts])
        model = MultipleKernelRidgeCV(
            kernels="precomputed", solver="random_search", solver_params=solver, cv=n_folds, random_state=0
        ).fit(kernels[:, :N_TRAIN], targets)
        outputs = model.predict(kernels[:, N_TRAIN:])
    else:
        groups = np.repeat(np.arange(len(data.layout.taps)), data.layout.widths)
        model = GroupRidgeCV(
            groups=groups, solver_params=solver | {"warn": False}, cv=n_folds, random_state=0
        )
        outputs = model.fit(rows[:N_TRAIN], targets).predict(rows[N_TRAIN:])
    return {"test": float((outputs.argmax(1) == data.labels[N_TRAIN:]).mean()), "kept": rows.shape[1]}


def peak_megabytes() -> float:
    """The highest memory of this process since the peak was set back."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) / 1024


def measure(folder: str, task: str, method: str, grid: dict[str, list[float]], n_folds: int) -> None:
    """Print the result of one method on one task as JSON, with its seconds and its highest memory."""
    use_threads(1)
    data = Data(Path(folder), task)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here; that of getrusage is inherited
    before = peak_megabytes()
    started, processor = time.perf_counter(), time.process_time()
    if method in HIMALAYA:
        result = by_himalaya(data, method, n_folds)
    else:
        result = by_method(data, method, grid, n_folds)
    result |= {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "megabytes": peak_megabytes() - before,
    }
    sys.stdout.write(json.dumps(result))


def measured(
    folder: Path, tasks: list[str], methods: list[str], grid: dict[str, list[float]], n_folds: int
) -> Iterator[dict[str, object]]:
    """A row per task and method, each from a process of its own or from what an earlier run left."""
    of_grid = hashlib.sha256(json.dumps(grid).encode()).hexdigest()[:8]
    for task in tasks:
        for method in methods:
            file = folder / f"result-{task}-{method}-{of_grid}-{n_folds}.json"
            if not file.exists():
                arguments = (str(folder), task, method, grid, n_folds)
                call = f"from tests.benchmarks.tap_kernels import measure; measure{arguments}"
                done = subprocess.run(
                    [sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, check=True
                )
                file.write_text(done.stdout)
            yield {"task": task, "method": method, **json.loads(file.read_text())}


def tables(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Test accuracy by task, then what each method took on average."""
    test = 100 * rows.pivot(index="method", columns="task", values="test")
    test = test.reindex(index=rows["method"].unique(), columns=rows["task"].unique())
    held_out = [task for task in test if task not in DEVELOPED_ON]
    means = {"mean": test.mean(axis=1), "mean held out": test[held_out].mean(axis=1)}
    yield "test accuracy, %", test.assign(**means)
    columns = ["seconds", "processor_seconds", "megabytes", "kept"]
    yield "per task", rows.groupby("method", sort=False)[columns].mean()


def main() -> None:
    """Print the tables."""
    from pipelines.cli import read_recipe  # the processes that measure have no use for it

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(IMAGES), choices=list(IMAGES))
    parser.add_argument(
        "--methods", nargs="+", default=[*METHODS_SHOWN, HIMALAYA[0]], choices=[*METHODS, *HIMALAYA]
    )
    parser.add_argument("--grid", default="demo", help="a recipe, whose grid is searched")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/tap-kernels"))
    options = parser.parse_args()
    console, methods = Console(), list(options.methods)
    if set(methods) & set(HIMALAYA) and find_spec("himalaya") is None:
        console.print("himalaya is left out: it is not installed (pip install himalaya)")
        methods = [method for method in methods if method not in HIMALAYA]
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(IMAGES[task] for task in options.tasks):
        prepare(options.folder, name)
    grid = read_recipe(options.grid, None).grid.model_dump() | {"target_size": [TARGET_SIZE]}
    settings = options.folder, options.tasks, methods, grid, options.folds
    rows = pd.DataFrame(measured(*settings))
    for title, table in tables(rows):
        console.print(title)
        console.print(tabulate(table.round(1), headers="keys"))


if __name__ == "__main__":
    main()
