"""``h2t plan``: what a run will take, before it runs: images, operations, bytes, time on 1 to 512 devices.

Work is counted exactly, from the recipe and its opened tasks. Time is that work over the rates of a short
calibration on the device at hand, with what the start of processes and the cut of the work add.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from h2t.backbones.loading import Backbone
from h2t.backbones.tap_reader import TapReader
from h2t.costs import (
    BackboneCost,
    finetuning_flops,
    fitting_flops,
    head_flops,
    measure_backbone,
    shared_training,
)
from h2t.device import default_device, use_threads
from h2t.features import FeatureLayout
from h2t.head2toe import fit
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from h2t.precision import BYTES
from pipelines.backbone import layouts, load, load_whole
from pipelines.config import Config
from pipelines.cross_validation import LEAST_FLOPS
from pipelines.shard_stream import SHARDS_PER_ACTOR
from pipelines.task_data import TaskData, open_task

DEVICES = (1, 8, 64, 512)
START_S = 9.0  # of Ray on one machine
STAGE_S = 6.0  # of the workers of one stage: they import torch and load what they need
JOB_S = 0.35  # of one job of Tune
RESULTS_S = 1.0  # of a task's small tables
DRIVER_S = {"extract": 0.012, "evaluate": 0.012, "sweep": 0.06, "finetune": 0.06}
"""What the driver alone takes for a unit of each stage, however many devices there are: Ray Data for a shard,
Tune for a trial (`python -m tests.benchmarks.overhead`)."""
CALIBRATION_IMAGES, CALIBRATION_STEPS = 24, 12
MOST_TOGETHER = 16  # heads of a calibration


@dataclass(frozen=True)
class StagePlan:
    """The work of one stage, cut into ``units``, or into ``finest`` where devices are many."""

    stage: str
    work: str
    flops: float
    bytes_written: float
    units: int
    seconds: float
    finest: int = 0

    def pieces(self, devices: int) -> int:
        """How many pieces the work is cut into for so many devices."""
        return max(self.units, min(self.finest, SHARDS_PER_ACTOR * devices))


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: images through backbone and pooling; operations on heads.

    ``head_flops`` of the many heads that the cross-validation trains together, ``final_flops`` of the few
    of one seed.
    """

    images: float
    head_flops: float
    final_flops: float
    device: str


@dataclass(frozen=True)
class _Facts:
    config: Config
    tasks: Sequence[TaskData]
    backbone: Backbone
    layouts: Mapping[int, FeatureLayout]

    @property
    def methods(self) -> list[str]:
        """Those on frozen features."""
        return [name for name in self.config.methods if not METHODS[name].trains_backbone]

    @cached_property
    def cost(self) -> BackboneCost:
        return measure_backbone(load_whole(self.config.backbone))

    @property
    def n_stored(self) -> int:
        return sum(len(task.labels[split]) for task in self.tasks for split in task.stored_splits)

    @property
    def feature_bytes(self) -> int:
        """Of all features that are stored, and of the products that tap kernels begin with."""
        return self._features_alone + self._products

    @property
    def _features_alone(self) -> int:
        if self.config.features.store == "gram":
            return 0
        number = BYTES[self.config.features.precision]
        return number * self.n_stored * sum(layout.n_features for layout in self.layouts.values())

    @property
    def _products(self) -> int:
        if not any(METHODS[name].by_tap for name in self.methods):
            return 0
        pairs = sum(len(task.labels[split]) ** 2 for task in self.tasks for split in task.stored_splits)
        return 4 * pairs * sum(len(layout.taps) for layout in self.layouts.values())

    def fitting(self, task: TaskData, points: Sequence[Hyperparameters], share: float = 1.0) -> int:
        """Operations of training points on a share of a task's images."""
        n_images = max(1, int(share * len(task.labels["train"])))
        return sum(
            fitting_flops(
                [point for point in points if point.target_size == size], layout, self.backbone.embedding,
                task.n_classes, n_images, self.config.batch_size,
            )
            for size, layout in self.layouts.items()
        )  # fmt: skip

    @property
    def n_test(self) -> int:
        return sum(len(task.labels["test"]) for task in self.tasks)


def facts_of(config: Config) -> _Facts:
    """The opened tasks, and the backbone with random weights. Raises UserError as a run would."""
    backbone = load(config.backbone, weights="random")
    tasks = [open_task(config, task.name) for task in config.tasks]
    return _Facts(config, tasks, backbone, layouts(config, backbone))


def feature_bytes(config: Config) -> int:
    """Bytes of all features that a run stores."""
    facts = facts_of(config)
    return facts.feature_bytes


def calibrate(facts: _Facts, cores: int = 1) -> Rates:
    """Measure the rates of one worker with so many cores."""
    use_threads(cores)
    device = default_device()
    backbone = facts.backbone
    backbone.model.to(device)
    size = backbone.image_size
    images = torch.rand(CALIBRATION_IMAGES, 3, size, size, device=device)
    with TapReader(backbone, list(facts.layouts), facts.config.backbone.aggregation) as reader:
        reader(images)
        started = time.perf_counter()
        reader(images)
        rate = CALIBRATION_IMAGES / (time.perf_counter() - started)
    size = min(facts.layouts)
    points = [p for name in facts.methods for p in facts.config.search_space(name) if p.target_size == size]
    together = len(
        {shared_training(p) for p in points if METHODS[p.method].features != "embedding" and p.steps}
    )
    few = sum(METHODS[name].features != "embedding" and not METHODS[name].solver for name in facts.methods)
    most = max(1, min(together, MOST_TOGETHER))
    return Rates(rate, _head_rate(facts, most, device), _head_rate(facts, max(1, few), device), device)


def _head_rate(facts: _Facts, n_heads: int, device: str) -> float:
    """Operations a second of so many heads that are trained together on all features."""
    layout, task = facts.layouts[min(facts.layouts)], facts.tasks[0]
    features = np.random.default_rng(0).random((512, layout.n_features), np.float32)
    labels = np.arange(512) % task.n_classes
    points = [Hyperparameters("all_l21", 0, 0.1 / (n + 1), CALIBRATION_STEPS, 1e-5) for n in range(n_heads)]
    options = {"n_classes": task.n_classes, "embedding": facts.backbone.embedding, "device": device}
    started = time.perf_counter()
    list(fit(features, labels, layout, points, **options))  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    return n_heads * head_flops(layout.n_features, task.n_classes, CALIBRATION_STEPS) / seconds


def plan(facts: _Facts, rates: Rates) -> list[StagePlan]:
    """The stages of a recipe, each with its work on one device."""
    return [*_frozen(facts, rates), *_finetuned(facts, rates)]


def _frozen(facts: _Facts, rates: Rates) -> Iterator[StagePlan]:
    config, cost = facts.config, facts.cost
    shards = math.ceil(facts.n_stored / config.resources.shard_size)
    yield StagePlan(
        "extract", f"{facts.n_stored:,} images", float(facts.n_stored * cost.forward_flops),
        float(facts.feature_bytes), shards, facts.n_stored / rates.images + STAGE_S,
        math.ceil(facts.n_stored / config.resources.images_per_forward),
    )  # fmt: skip
    points = [point for method in facts.methods for point in config.search_space(method)]
    n_folds = config.cross_validation.n_folds
    trainings = float(sum(n_folds * facts.fitting(task, points, 1 - 1 / n_folds) for task in facts.tasks))
    n_trials = len(points) * n_folds * len(facts.tasks)
    packs = n_folds * len(facts.tasks) * len(facts.layouts)
    n_shared = len(set(map(shared_training, points)))
    yield StagePlan(
        "sweep", f"{n_trials:,} trials", trainings, 300.0 * n_trials, packs,
        trainings / rates.head_flops + JOB_S * packs + STAGE_S,
        min(n_folds * len(facts.tasks) * n_shared, int(trainings / LEAST_FLOPS)),
    )  # fmt: skip
    chosen = [next(point for point in points if point.method == method) for method in facts.methods]
    finals = float(sum(len(config.seeds) * facts.fitting(task, chosen) for task in facts.tasks))
    n_heads = len(chosen) * len(config.seeds) * len(facts.tasks)
    yield StagePlan(
        "evaluate", f"{n_heads:,} heads, {facts.n_test:,} test images",
        finals + facts.n_test * cost.forward_flops, 20.0 * n_heads * facts.n_test / max(len(facts.tasks), 1),
        math.ceil(facts.n_test / config.resources.shard_size),
        finals / rates.final_flops + facts.n_test / rates.images + 2 * STAGE_S + RESULTS_S * len(facts.tasks),
        math.ceil(facts.n_test / config.resources.images_per_forward),
    )  # fmt: skip


def _finetuned(facts: _Facts, rates: Rates) -> Iterator[StagePlan]:
    config, cost = facts.config, facts.cost
    methods = [m for m in config.methods if METHODS[m].trains_backbone and not METHODS[m].best_of]
    if not methods:
        return
    options = config.finetune
    folds = config.cross_validation.n_folds if options.folds is None else options.folds
    steps = sum(options.steps) * len(options.learning_rate) * folds
    steps += max(options.steps) * len(options.seeds or config.seeds)
    classes = sum(task.n_classes for task in facts.tasks) / len(facts.tasks)
    flops = len(methods) * len(facts.tasks) * finetuning_flops(
        cost, cost.embedding_width, int(classes), steps, options.batch_size
    )  # fmt: skip
    trainings = len(methods) * len(facts.tasks) * (
        len(options.steps) * len(options.learning_rate) * folds + len(options.seeds or config.seeds)
    )  # fmt: skip
    speed = rates.images * cost.forward_flops
    yield StagePlan(
        "finetune", f"{trainings:,} trainings of the backbone", float(flops),
        4.0 * cost.parameters * trainings, trainings, flops / speed + STAGE_S,
    )  # fmt: skip


def seconds_on(stage: StagePlan, devices: int) -> float:
    """Wall time on so many devices: the work is cut into units, and no device has half of one."""
    units = stage.pieces(devices)
    rounds = math.ceil(units / devices) / max(units, 1)
    driver = units * DRIVER_S.get(stage.stage, 0.0)
    return max((stage.seconds - STAGE_S) * rounds, driver) + STAGE_S


def total_seconds(stages: Sequence[StagePlan], devices: int) -> float:
    """Wall time of all stages in turn."""
    return START_S + sum(seconds_on(stage, devices) for stage in stages)


def bottleneck(stages: Sequence[StagePlan], devices: int) -> str:
    """The stage that takes most of the time on so many devices."""
    return max(stages, key=lambda stage: seconds_on(stage, devices)).stage
