"""Measure how fast heads are trained: ``python -m tests.benchmarks.heads [--quick]``.

Every figure is a ratio of processor times taken alternately in one process on one thread, so that what else
the machine does falls on both sides. The plain loop trains one head at a time with autograd, the group lasso
written as ``W.norm(dim=1).sum()`` (left out where a head has no regularizer) and PyTorch's fused Adam. The
peak is that of a float32 matrix product of 2048.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from tabulate import tabulate

from h2t.device import slow_in_bfloat16
from h2t.features import FeatureLayout
from h2t.head2toe import GROUP_BYTES, fit
from h2t.heads.blocks import HeadGroup
from h2t.heads.spec import HeadSpec, Precision
from h2t.heads.trainer import Batches, HeadTrainer
from h2t.heads.training import train_heads
from h2t.hyperparameters import Hyperparameters
from h2t.methods import search_space
from h2t.selection import keep_top, relevance_scores

N_ROWS, N_TAPS, N_FEATURES, N_CLASSES, BATCH = 800, 52, 30_440, 10, 128
RATES, STEPS = (0.1, 0.01), (500, 5000)
COEFFICIENTS, SCORING_COEFFICIENTS = (1e-3, 1e-4, 1e-5), (1e-3, 1e-5)
Table = list[dict[str, object]]
FRACTIONS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
STEP_FLOPS = 4 * N_ROWS / 7  # of the products of a step per weight: seven batches in 800 rows


def random_data(n_features: int, n_classes: int = N_CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features of about unit norm per tap, float32 [800, n_features], and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, n_classes, (N_ROWS,), generator=generator)
    features = torch.randn(N_ROWS, n_features, generator=generator).mul_((N_TAPS / n_features) ** 0.5)
    return features, labels


def grid(steps: int) -> list[HeadSpec]:
    """Phase 1 of the paper's grid for one number of steps; ``head2toe`` adds nothing to ``all_l21``."""
    return [
        HeadSpec(rate, steps, regularizer, coefficient)
        for regularizer in ("l1", "l2", "l21")
        for rate in RATES
        for coefficient in COEFFICIENTS
    ]


def processor_time(function: Callable[[], object]) -> float:
    """Seconds of processor time of one call."""
    started = time.process_time()
    function()
    return time.process_time() - started


class Peak:
    """The floating-point rate of a square float32 product of 2048, in flop/s."""

    def __init__(self) -> None:
        self.factor, self.out = torch.randn(2048, 2048), torch.empty(2048, 2048)

    def __call__(self) -> float:
        return 2 * 2048**3 / processor_time(lambda: torch.mm(self.factor, self.factor, out=self.out))


def trainer(
    labels: torch.Tensor, *groups: tuple[torch.Tensor, list[HeadSpec]], precision: Precision = "float32"
) -> HeadTrainer:
    """A trainer of groups of heads that has taken a step, so that its memory is there."""
    batches = Batches(labels, int(labels.max()) + 1, BATCH)
    ready = HeadTrainer(
        batches, [HeadGroup(rows.to(getattr(torch, precision)), specs) for rows, specs in groups]
    )
    ready.step(0)
    return ready


def take(trained: HeadTrainer, n_steps: int) -> float:
    """Processor time of a step, averaged over ``n_steps``, in seconds."""
    return processor_time(lambda: [trained.step(step) for step in range(1, n_steps + 1)]) / n_steps


class PlainLoop:
    """One head, as one would write it at first."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, regularized: bool = True) -> None:
        self.batches = list(zip(features.split(BATCH), labels.split(BATCH), strict=True))
        n_features = features.shape[1]
        self.weight = torch.empty(n_features, N_CLASSES).uniform_(-0.01, 0.01).requires_grad_()
        self.bias = torch.zeros(N_CLASSES, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weight, self.bias], lr=0.01, eps=1e-7, fused=True)
        self.regularized = regularized
        self.run(2)

    def run(self, n_steps: int) -> None:
        for step in range(n_steps):
            features, labels = self.batches[step % len(self.batches)]
            self.optimizer.zero_grad()
            logits = features @ self.weight + self.bias
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / BATCH
            if self.regularized:
                loss = loss + 1e-4 * len(labels) / BATCH * self.weight.norm(dim=1).sum()
            loss.backward()
            self.optimizer.step()


def phase_1(rounds: int, n_steps: int) -> Table:
    """Head-steps of stacks of several sizes beside the plain loop and the peak."""
    features, labels = random_data(N_FEATURES)
    plain, peak, rows = PlainLoop(features, labels), Peak(), []
    for n_heads in (1, 4, 18, 36):
        specs = (grid(1000) * 2)[:: -(-18 // n_heads)][:n_heads]
        stack = trainer(labels, (features, sorted(specs, key=lambda spec: spec.regularizer or "")))
        seen = []
        for _ in range(rounds):
            top, ours = peak(), take(stack, n_steps) / n_heads
            theirs = processor_time(lambda: plain.run(n_steps)) / n_steps
            at_peak = STEP_FLOPS * N_FEATURES * N_CLASSES / max(top, peak())
            seen.append((ours, theirs, theirs / ours, theirs / at_peak, at_peak / ours))
        ours, theirs, ratio, most, share = (median(values) for values in zip(*seen, strict=True))
        rows.append(
            {
                "heads": n_heads,
                "ms per head-step": ours * 1e3,
                "plain loop, ms": theirs * 1e3,
                "times the plain loop": ratio,
                "at the peak it were": most,
                "share of the peak": share,
            }
        )
    return rows


def where_the_time_goes() -> Table:
    """Share of each operation in the steps of a stack of 18 heads."""
    features, labels = random_data(N_FEATURES)
    stack = trainer(labels, (features, grid(1000)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        take(stack, 14)
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    top = sorted(events, key=lambda event: -event.self_cpu_time_total)[:8]
    return [{"operation": event.key, "share": event.self_cpu_time_total / total} for event in top]


def phase_2(rounds: int, n_steps: int, precision: Precision = "float32") -> Table:
    """Final heads of eight fractions times two rates and two coefficients, beside the plain loop."""
    features, labels = random_data(N_FEATURES)
    rows, sums = [], np.zeros(2)
    for sizes in side_by_side():
        groups = [
            (kept_features(features, n_kept)[:count], final_specs()[:count])
            for n_kept, count in sizes.items()
        ]
        stack = trainer(labels, *groups, precision=precision)
        plain = {
            n_kept: PlainLoop(matrices[0], labels, regularized=False)
            for n_kept, (matrices, _) in zip(sizes, groups, strict=True)
        }
        seen = []
        for _ in range(rounds):
            ours = take(stack, n_steps)
            theirs = 0.0
            for n_kept, count in sizes.items():
                theirs += count * processor_time(partial(plain[n_kept].run, n_steps)) / n_steps
            seen.append((ours, theirs))
        ours, theirs = (median(values) for values in zip(*seen, strict=True))
        sums += ours, theirs
        rows.append(phase_2_row(", ".join(map(str, sizes)), sum(sizes.values()), ours, theirs))
    return [*rows, phase_2_row("all", len(FRACTIONS) * len(final_specs()), *sums)]


def phase_2_row(kept: str, n_heads: int, ours: float, theirs: float) -> dict[str, object]:
    return {
        "kept": kept,
        "heads": n_heads,
        "µs per head-step": ours / n_heads * 1e6,
        "plain loop, µs": theirs / n_heads * 1e6,
        "times": theirs / ours,
    }


def final_specs() -> list[HeadSpec]:
    """The final heads of one fraction: two rates after two scoring phases."""
    return [HeadSpec(rate, 1000) for rate in RATES for _ in SCORING_COEFFICIENTS]


def side_by_side() -> Iterator[dict[int, int]]:
    """What ``fit`` trains side by side: how many heads on how many kept features."""
    part: dict[int, int] = {}
    used = 0
    for n_kept in sorted(int(N_FEATURES * fraction) for fraction in FRACTIONS for _ in final_specs()):
        size = 4 * N_ROWS * n_kept
        if part and used + size > GROUP_BYTES["cpu"]:
            yield part
            part, used = {}, 0
        part[n_kept] = part.get(n_kept, 0) + 1
        used += size
    yield part


def kept_features(features: torch.Tensor, n_kept: int) -> torch.Tensor:
    """Other columns for each head, float32 [n_heads, 800, n_kept]."""
    every = N_FEATURES // n_kept
    return torch.stack([features[:, start::every][:, :n_kept] for start in range(len(final_specs()))])


def paper_grid(shorter: int = 1) -> list[Hyperparameters]:
    """The paper's grid at one target size, with ``shorter`` times fewer steps."""
    values = SimpleNamespace(
        target_size=[1024],
        learning_rate=RATES,
        steps=[steps // shorter for steps in STEPS],
        coefficient=COEFFICIENTS,
        head2toe_coefficient=SCORING_COEFFICIENTS,
        keep_fraction=FRACTIONS,
    )
    methods = ("linear", "all_l2", "all_l1", "all_l21", "head2toe")
    return [point for method in methods for point in search_space(method, values)]


def plain_sweep_seconds(points: Iterable[Hyperparameters], n_steps: int = 14) -> float:
    """Processor time that the plain loop would need for all points of a fold, from its time per step."""
    features, labels = random_data(N_FEATURES)
    per_step: dict[int, float] = {}
    scoring, total = set(), 0.0
    for point in points:
        sizes = [2048 if point.method == "linear" else int(N_FEATURES * point.keep_fraction)]
        phase = (point.learning_rate, point.steps, point.coefficient)
        if point.method == "head2toe" and phase not in scoring:  # once for all fractions, as in the paper
            scoring.add(phase)
            sizes.append(N_FEATURES)
        for size in sizes:
            if size not in per_step:
                per_step[size] = plain_step_seconds(features[:, :size], labels, n_steps)
            total += per_step[size] * point.steps
    return total


def plain_step_seconds(features: torch.Tensor, labels: torch.Tensor, n_steps: int) -> float:
    """Processor time of a step of the plain loop; heads on all features have a regularizer."""
    plain = PlainLoop(features.contiguous(), labels, regularized=features.shape[1] == N_FEATURES)
    return median(processor_time(lambda: plain.run(n_steps)) for _ in range(3)) / n_steps


def one_fold(shorter: int) -> Table:
    """All points of one fold by ``fit``, with ``shorter`` times fewer steps, beside the plain loop."""
    features, labels = random_data(N_FEATURES)
    widths = [N_FEATURES // N_TAPS] * (N_TAPS - 1)
    layout = FeatureLayout(tuple(map(str, range(N_TAPS))), (*widths, N_FEATURES - sum(widths)))
    points = paper_grid(shorter)
    options = {"n_classes": N_CLASSES, "embedding": str(N_TAPS - 1)}
    theirs = plain_sweep_seconds(points)
    ours = processor_time(lambda: list(fit(features.numpy(), labels.numpy(), layout, points, **options)))  # type: ignore[arg-type]
    return [
        {
            "points": len(points),
            "steps": str([s // shorter for s in STEPS]),
            "fit, s": ours,
            "plain loop, s": theirs,
            "times": theirs / ours,
        }
    ]


def peak_memory(n_features: int, n_heads: int) -> None:
    """Print bytes beyond what was there before the features were made (run in a process of its own)."""
    features, labels = random_data(1024)
    train_heads(features, labels, [HeadSpec(0.1, 1)], n_classes=N_CLASSES)
    before = high_water()
    matrix = np.random.default_rng(0).random((N_ROWS, n_features), dtype=np.float32)
    specs = [HeadSpec(0.1, 2, "l21", 1e-3, seed) for seed in range(n_heads)]
    train_heads(matrix, labels, specs, n_classes=N_CLASSES)
    print(high_water() - before)


def high_water() -> int:
    """Bytes of memory this process has held at most (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def memory(n_features: int) -> Table:
    """Peak memory against features + 3 x weights, and what the paper's largest case needs."""
    rows = []
    for n_heads in (1, 9):
        call = f"from tests.benchmarks.heads import peak_memory; peak_memory({n_features}, {n_heads})"
        peak = int(
            subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True).stdout
        )
        needed = needed_bytes(N_ROWS, n_features, N_CLASSES, n_heads)
        rows.append(
            {
                "features": n_features,
                "classes": N_CLASSES,
                "heads": n_heads,
                "peak, GB": peak / 1e9,
                "features + 3 weights, GB": needed / 1e9,
                "ratio": peak / needed,
            }
        )
    for n_heads in (1, 8):
        sun = needed_bytes(1000, 1_688_808, 397, n_heads)
        rows.append(
            {"features": 1_688_808, "classes": 397, "heads": n_heads, "features + 3 weights, GB": sun / 1e9}
        )
    return rows


def needed_bytes(n_rows: int, n_features: int, n_classes: int, n_heads: int) -> int:
    """Bytes of the features and of three copies of the weights."""
    return 4 * n_features * (n_rows + 3 * n_classes * n_heads)


def budget(n_features: int, n_steps: int) -> Table:
    """A stack under memory budgets: time and largest difference of a weight from the stack without one."""
    features, labels = random_data(n_features)
    specs = [HeadSpec(0.01, n_steps, "l21", 1e-3, seed) for seed in range(4)]
    one, rows, unbounded = 3 * 4 * n_features * N_CLASSES, [], None
    for name, bound in (("none", None), ("two heads", 2 * one), ("less than a head", one // 2)):
        started = time.process_time()
        stack = train_heads(features, labels, specs, n_classes=N_CLASSES, memory_budget=bound)
        seconds = time.process_time() - started
        unbounded = unbounded or stack
        difference = float((stack.weight - unbounded.weight).abs().max())
        rows.append({"budget": name, "seconds": seconds, "largest difference of a weight": difference})
    return rows


def growth(largest: int, n_steps: int) -> Table:
    """Time per weight and step as features, classes and heads grow (constant where cost grows linearly)."""
    rows = []
    for n_features in (30_000, 120_000, 480_000):
        for n_classes in (10, 100):
            features, labels = random_data(n_features, n_classes)
            for n_heads in (1, 4, 16):
                if needed_bytes(N_ROWS, n_features, n_classes, n_heads) > largest:
                    continue
                stack = trainer(labels, (features, [HeadSpec(0.01, 100, "l21", 1e-3)] * n_heads))
                seconds = min(take(stack, n_steps) for _ in range(2))
                rows.append(
                    {
                        "features": n_features,
                        "classes": n_classes,
                        "heads": n_heads,
                        "ms per step": seconds * 1e3,
                        "ns per weight": seconds / (n_features * n_classes * n_heads) * 1e9,
                    }
                )
    return rows


def lower_precision(rounds: int, n_steps: int) -> Table:
    """Products in bfloat16 beside float32: time, kept features and training accuracy."""
    features, labels = random_data(N_FEATURES)
    full, half = (trainer(labels, (features, grid(1000)), precision=precision) for precision in PRECISIONS)
    seen = [(take(full, n_steps), take(half, n_steps)) for _ in range(rounds)]
    del full, half
    spec = [HeadSpec(0.01, 100, "l21", 1e-3)]
    kept, accuracy = [], []
    for precision in PRECISIONS:
        stack = train_heads(features, labels, spec, n_classes=N_CLASSES, precision=precision)
        kept.append(keep_top(relevance_scores(stack.weight[0]), 0.01))
        accuracy.append(
            float(((features @ stack.weight[0] + stack.bias[0]).argmax(1) == labels).float().mean())
        )
    return [
        {
            "times float32's speed": median(a / b for a, b in seen),
            "same kept features": len(np.intersect1d(*kept)) / len(kept[0]),
            "training accuracy, float32": accuracy[0],
            "bfloat16": accuracy[1],
        }
    ]


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rounds, n_steps = (2, 2) if quick else (5, 7)
    peak = Peak()
    print(f"peak of one thread: {median(peak() for _ in range(5)) / 1e9:.1f} Gflop/s\n")
    tables: dict[str, Callable[[], Table]] = {
        "Phase 1: 30,440 features, 10 classes": lambda: phase_1(rounds, n_steps),
        "Where the time of 18 heads goes": where_the_time_goes,
        "Phase 2: heads on kept features": lambda: phase_2(rounds, 10 * n_steps),
        "All points of one fold": lambda: one_fold(250 if quick else 25),
        "Peak memory": lambda: memory(120_000 if quick else 467_688),
        "Memory budget": lambda: budget(30_440 if quick else 120_000, 10),
        "Growth": lambda: growth(2**28 if quick else 3 * 2**30, 1 if quick else 3),
        "Products in bfloat16": lambda: lower_precision(rounds, 1),
    }
    if slow_in_bfloat16():
        print("Products in bfloat16: skipped, since this processor has none")
        del tables["Products in bfloat16"]
    for title, table in tables.items():
        print(title, tabulate(table(), headers="keys", floatfmt=".3g"), "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
