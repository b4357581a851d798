"""What the stages of a run share, and what a step of a stage is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Thread
from typing import Any, Protocol

from rich.console import Console

from h2t.backbones.loading import Backbone
from h2t.device import STRICT
from h2t.features import FeatureLayout
from h2t.methods import METHODS
from h2t.precision import BYTES
from pipelines.backbone import layouts, load
from pipelines.cluster import Cluster
from pipelines.config import Config
from pipelines.connection import connect
from pipelines.run_directory import RunDirectory
from pipelines.task_data import TaskData, open_task

Advance = Callable[[int, str], None]
"""Counts units that are done, and says where they were."""


class Background(Thread):
    """Work in a thread of its own, which ends with the process. ``error``: what it ended with."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do the work."""
        try:
            self.work()
        except BaseException as error:  # for the thread that waits
            self.error = error

    def wait(self) -> None:
        """Until the work is done. Raises what it raised."""
        self.join()
        if self.error:
            raise self.error


@dataclass(eq=False)
class Session:
    """One run: its recipe, opened tasks, directory and screen. The cluster starts when it is first needed.

    ``extraction``: that of the features which the sweep takes as they come, where both run side by side.
    """

    config: Config
    run: RunDirectory
    console: Console
    address: str | None = None
    extraction: Background | None = None

    @cached_property
    def tasks(self) -> Mapping[str, TaskData]:
        """The tasks of the recipe by name, their images opened and their labels read."""
        return {task.name: open_task(self.config, task.name) for task in self.config.tasks}

    @cached_property
    def cluster(self) -> Cluster:
        """The Ray cluster, connected to or started here with room for two feature matrices."""
        environment = STRICT if self.config.deterministic == "strict" else None
        cluster = connect(
            self.address, environment=environment, matrix_bytes=lambda: max(self.matrix_bytes.values())
        )
        if cluster.store_folder:
            self.console.print(
                f"features are shared through files in {cluster.store_folder}: shared memory has no room "
                "for them (in a container: --shm-size)"
            )
        return cluster

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone with random weights, of which taps, widths and costs are known."""
        return load(self.config.backbone, weights="random")

    @cached_property
    def layouts(self) -> Mapping[int, FeatureLayout]:
        """The taps and their widths, by target size."""
        return layouts(self.config, self.backbone)

    @cached_property
    def matrix_bytes(self) -> Mapping[int, int]:
        """Bytes of the largest task's matrix of features that are trained on, by target size.

        Methods that read features tap by tap need none.
        """
        frozen = [name for name in self.config.methods if not METHODS[name].trains_backbone]
        if all(METHODS[name].by_tap for name in frozen) and not self.config.studies:
            return dict.fromkeys(self.layouts, 0)
        number = BYTES[self.config.features.precision]
        n_rows = max(len(task.labels[split]) for task in self.tasks.values() for split in task.stored_splits)
        return {size: number * n_rows * layout.n_features for size, layout in self.layouts.items()}


class Product(Protocol):
    """What one folder of the run directory is to hold."""

    @property
    def folder(self) -> str:
        """Its name, relative to the run directory."""
        ...

    def is_current(self, run: RunDirectory, name: str, location: str) -> bool:
        """Whether a file of that name, which lies at ``location``, belongs to the present configuration."""
        ...

    def is_whole(self, run: RunDirectory, name: str) -> bool:
        """Whether a file there is what was written, as far as that is cheap to tell."""
        ...

    def missing(self, run: RunDirectory, present: Sequence[str]) -> list[Any]:
        """Units of work that make what the present files lack."""
        ...


@dataclass(frozen=True)
class Step:
    """A step of a stage: what it makes, and how.

    ``title`` begins its lines on the screen; ``unit``: what its progress counts; ``make`` writes the files of
    missing units; ``count``: how many of ``unit`` these are. A ``brief`` step is done in no time and says
    nothing.
    """

    title: str
    unit: str
    products: Callable[[Session], Sequence[Product]]
    make: Callable[[Session, list[Any], Advance], None]
    count: Callable[[Sequence[Any]], int] = len
    brief: bool = False
