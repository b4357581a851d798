"""``h2t plan``: what a run will take, before it runs: images, operations, bytes, time on 1 to 512 devices.

Work is counted exactly, from the recipe and its opened tasks. Time is that work over the rates of a short
calibration on the device at hand, with what the start of processes and the cut of the work add.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch

from h2t.backbones.loading import Backbone
from h2t.backbones.tap_reader import TapReader
from h2t.costs import BackboneCost, finetuning_flops, head_flops, measure_backbone
from h2t.device import default_device
from h2t.features import FeatureLayout
from h2t.head2toe import fit
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from pipelines.backbone import layouts, load, load_whole
from pipelines.config import Config
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
    """The work of one stage; ``units``: its largest number of pieces that can run side by side."""

    stage: str
    work: str
    flops: float
    bytes_written: float
    units: int
    seconds: float


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
    return 4 * facts.n_stored * sum(layout.n_features for layout in facts.layouts.values())


def calibrate(facts: _Facts, cores: int = 1) -> Rates:
    """Measure the rates of one worker with so many cores."""
    torch.set_num_threads(cores)
    device = default_device()
    backbone = facts.backbone
    backbone.model.to(device)
    size = backbone.image_size
    images = torch.rand(CALIBRATION_IMAGES, 3, size, size, device=device)
    with TapReader(backbone, list(facts.layouts), facts.config.backbone.cls_token) as reader:
        reader(images)
        started = time.perf_counter()
        reader(images)
        rate = CALIBRATION_IMAGES / (time.perf_counter() - started)
    size = min(facts.layouts)
    points = [p for name in facts.methods for p in facts.config.search_space(name) if p.target_size == size]
    together = len({_scoring(p) for p in points if METHODS[p.method].features != "embedding" and p.steps})
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
    stored = 4 * facts.n_stored * sum(layout.n_features for layout in facts.layouts.values())
    shards = math.ceil(facts.n_stored / config.resources.shard_size)
    yield StagePlan(
        "extract", f"{facts.n_stored:,} images", float(facts.n_stored * cost.forward_flops), float(stored),
        shards, facts.n_stored / rates.images + STAGE_S,
    )  # fmt: skip
    points = [point for method in facts.methods for point in config.search_space(method)]
    n_folds = config.cross_validation.n_folds
    trainings = sum(
        n_folds * training_flops(facts, task, points, share=1 - 1 / n_folds) for task in facts.tasks
    )
    n_trials = len(points) * n_folds * len(facts.tasks)
    packs = n_folds * len(facts.tasks) * len(facts.layouts)
    yield StagePlan(
        "sweep", f"{n_trials:,} trials", trainings, 300.0 * n_trials, packs,
        trainings / rates.head_flops + JOB_S * packs + STAGE_S,
    )  # fmt: skip
    chosen = [next(point for point in points if point.method == method) for method in facts.methods]
    finals = sum(len(config.seeds) * training_flops(facts, task, chosen) for task in facts.tasks)
    n_heads = len(chosen) * len(config.seeds) * len(facts.tasks)
    yield StagePlan(
        "evaluate", f"{n_heads:,} heads, {facts.n_test:,} test images",
        finals + facts.n_test * cost.forward_flops, 20.0 * n_heads * facts.n_test / max(len(facts.tasks), 1),
        math.ceil(facts.n_test / config.resources.shard_size),
        finals / rates.final_flops + facts.n_test / rates.images + 2 * STAGE_S + RESULTS_S * len(facts.tasks),
    )  # fmt: skip


def training_flops(
    facts: _Facts, task: TaskData, points: Sequence[Hyperparameters], share: float = 1.0
) -> float:
    """Operations of training points on a share of a task's images; a scoring phase counts once for all F."""
    total, batch = 0.0, min(facts.config.batch_size, max(1, int(share * len(task.labels["train"]))))

    for _, group in groupby(sorted(points, key=_scoring), key=_scoring):
        members = list(group)
        layout = facts.layouts[members[0].target_size]
        widths = dict(zip(layout.taps, layout.widths, strict=True))
        method, steps = METHODS[members[0].method], members[0].steps
        if method.features == "embedding":
            total += head_flops(widths[facts.backbone.embedding], task.n_classes, max(steps, 1), batch)
            continue
        n_features = layout.n_features
        if method.scored:
            total += head_flops(n_features, task.n_classes, max(steps, 1), batch)
        kept = [int(n_features * p.keep_fraction) for p in members if METHODS[p.method].features == "kept"]
        total += head_flops(sum(kept), task.n_classes, steps, batch)
    return total


def _scoring(point: Hyperparameters) -> str:
    """What says that points share their training on all features, or on the embedding."""
    method = METHODS[point.method]
    parts = (method.regularizer, point.target_size, point.learning_rate, point.steps, point.coefficient,
             method.normalization, method.scored, method.solver, method.features == "embedding")  # fmt: skip
    return str(parts)


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
    rounds = math.ceil(stage.units / devices) / max(stage.units, 1)
    driver = stage.units * DRIVER_S.get(stage.stage, 0.0)
    return max((stage.seconds - STAGE_S) * rounds, driver) + STAGE_S


def total_seconds(stages: Sequence[StagePlan], devices: int) -> float:
    """Wall time of all stages in turn."""
    return START_S + sum(seconds_on(stage, devices) for stage in stages)


def bottleneck(stages: Sequence[StagePlan], devices: int) -> str:
    """The stage that takes most of the time on so many devices."""
    return max(stages, key=lambda stage: seconds_on(stage, devices)).stage
