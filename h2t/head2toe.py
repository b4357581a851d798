"""Head2Toe and its baselines on frozen features: score, keep, train the final head (Section 3.2)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from h2t.errors import UserError, unknown
from h2t.features import FeatureLayout, keep_features, unit_norm
from h2t.heads.blocks import HeadStack
from h2t.heads.solvers import SOLVERS
from h2t.heads.spec import HeadSpec, Precision
from h2t.heads.training import train_groups, train_stacks
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS, find_method
from h2t.metrics import cross_entropy
from h2t.selection import RULES

Phase = Literal["first", "final"]
PHASES = get_args(Phase)
"""The training on all features (or the embedding), which may score them; that of the head on kept ones."""

# Features of final heads that are trained together: few enough that on a CPU they stay in the cache from step
# to step.
GROUP_BYTES = {"cpu": 2**23, "cuda": 2**30}


@dataclass
class Head:
    """A head trained on frozen features.

    ``kept`` int64 [n_kept]: ascending indices into the features of ``layout``; ``weight`` float32
    [n_kept, n_classes]; ``bias`` float32 [n_classes]; ``train_loss``: mean cross-entropy over the training
    rows, nats.
    """

    hyperparameters: Hyperparameters
    seed: int
    kept: np.ndarray
    layout: FeatureLayout
    weight: np.ndarray
    bias: np.ndarray
    train_loss: float


def logits(head: Head, features: np.ndarray) -> np.ndarray:
    """Logits float32 [n, n_classes] of raw features float32 [n, n_features], all of the head's layout."""
    return keep_features(features, head.layout, head.kept) @ head.weight + head.bias


@dataclass(frozen=True)
class _Data:
    """Everything that the heads of a call share; ``rows``: those of ``features`` to train on."""

    features: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    layout: FeatureLayout
    memory_budget: int | None
    shuffle: Sequence[int] | None
    options: dict[str, Any]

    def order(self, seed: int, phase: Phase) -> np.ndarray:
        """The rows in the order in which a phase of the training with that seed takes them, int64."""
        if self.shuffle is None:
            return self.rows
        generator = np.random.default_rng([*self.shuffle, seed, PHASES.index(phase)])
        return generator.permutation(self.rows)

    def inputs(self, kept: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The kept features of rows with unit norm per tap, a new float32 [n_rows, n_kept]."""
        return keep_features(self.features, self.layout, kept, order)


class _Final(NamedTuple):
    """A head to be trained on the features that a rule has kept, in a second phase."""

    spec: HeadSpec
    point: Hyperparameters
    kept: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.spec.steps, len(self.kept)


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    layout: FeatureLayout,
    hyperparameters: Sequence[Hyperparameters],
    *,
    n_classes: int,
    embedding: str,
    seeds: Sequence[int] = (0,),
    rows: np.ndarray | None = None,
    shuffle: Sequence[int] | None = None,
    batch_size: int = 128,
    memory_budget: int | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
) -> Iterator[Head]:
    """Train a head for every point of ``hyperparameters`` and seed; each is yielded as soon as it is done.

    ``features`` float32 [n, n_features] raw, never written; ``labels`` integer [n]; ``rows`` int64 [n_rows]
    are those to train on (default: all). All points have the same target size, that of the features.
    ``embedding`` names the tap that methods on the embedding use. ``memory_budget`` in bytes bounds what is
    allocated here on top of one normalised copy of the training rows.

    ``shuffle``: numbers that, with the seed of a head, draw the order of its rows, which each of the two
    phases repeats until its steps are done; so the official code has it, which reads the images in a new
    order whenever it computes their features. None takes the rows as they come.

    Methods with the same training on all features share it: ``all_l21`` and the scoring phase of ``head2toe``
    of the same rate, steps, coefficient and seed, for all fractions. The other points and seeds of a call
    change no bit of a head on a CPU with one thread; ``h2t.heads.trainer`` says where they may.

    Raises UserError, before any training, for hyperparameters, labels or features that cannot be used.
    """
    check_hyperparameters(hyperparameters, layout)
    if embedding not in layout.taps:
        raise unknown("tap", embedding, layout.taps)
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    rows = np.arange(len(labels)) if rows is None else np.asarray(rows)
    options = {"n_classes": n_classes, "batch_size": batch_size, "device": device, "precision": precision}
    data = _Data(features, labels, rows, layout, memory_budget, shuffle, options)
    on_embedding = [point for point in hyperparameters if METHODS[point.method].features == "embedding"]
    on_all = [point for point in hyperparameters if METHODS[point.method].features != "embedding"]
    of_embedding, everything = layout.slices[layout.taps.index(embedding)], slice(0, layout.n_features)
    return chain.from_iterable(
        fit_some(data, some, seeds, columns)
        for points, columns in ((on_embedding, of_embedding), (on_all, everything))
        for fit_some, some in (
            (_solve_columns, [point for point in points if METHODS[point.method].solver]),
            (_fit_columns, [point for point in points if not METHODS[point.method].solver]),
        )
    )


def check_hyperparameters(hyperparameters: Sequence[Hyperparameters], layout: FeatureLayout) -> None:
    """Raise UserError for points that cannot be trained together on features of that layout."""
    if len({point.target_size for point in hyperparameters}) > 1:
        raise UserError("expected hyperparameters of one target size: they are trained on the same features")
    for point in hyperparameters:
        method = find_method(point.method)
        if method.trains_backbone:
            raise UserError(f"{point.method} trains the backbone; expected a method on frozen features")
        in_range = 0 < point.keep_fraction <= 1 and int(layout.n_features * point.keep_fraction)
        if method.features == "kept" and not in_range:
            raise UserError(
                f"keep_fraction {point.keep_fraction} keeps none of {layout.n_features} features; "
                f"expected {1 / layout.n_features:.2g} to 1"
            )


def _solve_columns(
    data: _Data, points: Sequence[Hyperparameters], seeds: Sequence[int], columns: slice
) -> Iterator[Head]:
    """Solve for heads on a range of the features; they are the same for every seed."""
    if not points:
        return
    kept = np.arange(columns.start, columns.stop, dtype=np.int64)
    inputs, labels = data.inputs(kept, data.rows), data.labels[data.rows]
    for method, group in groupby(sorted(points), lambda point: point.method):
        members = list(group)
        solver = SOLVERS[str(METHODS[method].solver)]
        coefficients = [point.coefficient for point in members]
        solutions = solver(inputs, labels, data.options["n_classes"], coefficients)
        for point, (weight, bias) in zip(members, solutions, strict=True):
            loss = cross_entropy(inputs @ weight + bias, labels)
            for seed in seeds:
                yield Head(point, seed, kept, data.layout, weight, bias, loss)


def _fit_columns(
    data: _Data, points: Sequence[Hyperparameters], seeds: Sequence[int], columns: slice
) -> Iterator[Head]:
    """Train heads on a range of the features, then those on what they keep."""
    columns_kept = np.arange(columns.start, columns.stop, dtype=np.int64)
    finals: list[_Final] = []
    for seed in seeds:
        by_spec: dict[HeadSpec, list[Hyperparameters]] = {}  # what uses a training: its head or its scores
        for point in points:
            method = METHODS[point.method]
            if method.features == "kept" and not method.scored:
                finals.append(_final(point, seed, None, data.layout))
            else:
                spec = HeadSpec(point.learning_rate, point.steps, method.regularizer, point.coefficient, seed)
                by_spec.setdefault(spec, []).append(point)
        for spec, stack, position in _fit_specs(data, list(by_spec), columns_kept):
            for point in by_spec[spec]:
                if METHODS[point.method].features == "kept":
                    finals.append(_final(point, seed, stack.weight[position], data.layout))
                else:
                    yield _head(point, seed, columns_kept, data.layout, stack, position)
    yield from _fit_kept(data, finals)


def _fit_specs(
    data: _Data, specs: Sequence[HeadSpec], columns: np.ndarray
) -> Iterator[tuple[HeadSpec, HeadStack, int]]:
    """Train heads of one seed on the same features: each spec with a stack and its position in that."""
    if not specs:
        return
    order = data.order(specs[0].seed, "first")
    for heads, stack in train_stacks(
        data.inputs(columns, order), data.labels[order], specs, layout=data.layout.of_kept(columns),
        memory_budget=data.memory_budget, **data.options,
    ):  # fmt: skip
        for position, head in enumerate(heads):
            yield specs[head], stack, position


def _final(point: Hyperparameters, seed: int, weight: Tensor | None, layout: FeatureLayout) -> _Final:
    """The final head that follows a scoring phase: same rate, steps and seed, no regularizer."""
    rule = METHODS[point.method].selection
    assert rule is not None, f"{point.method} keeps features by no rule"
    spec = HeadSpec(point.learning_rate, point.steps, seed=seed)
    return _Final(spec, point, RULES[rule](weight, layout, point.keep_fraction, seed))


def _fit_kept(data: _Data, finals: list[_Final]) -> Iterator[Head]:
    """Train final heads, each on its kept features; those of equal steps are trained side by side."""
    for groups in _trained_together(finals, len(data.rows), data.options["device"]):
        # Products this small gain nothing from bfloat16.
        options = {**data.options, "precision": "float32"}
        stacks = train_groups([_with_inputs(data, group) for group in groups], **options)
        for group, stack in zip(groups, stacks, strict=True):
            for position, final in enumerate(group):
                yield _head(final.point, final.spec.seed, final.kept, data.layout, stack, position)


def _with_inputs(data: _Data, group: Sequence[_Final]) -> tuple[np.ndarray, np.ndarray, list[HeadSpec]]:
    """Features float32 [n_heads, n_rows, n_kept], labels [n_heads, n_rows] and specs of final heads."""
    orders = [data.order(final.spec.seed, "final") for final in group]
    inputs = [data.inputs(final.kept, order) for final, order in zip(group, orders, strict=True)]
    return np.stack(inputs), data.labels[np.stack(orders)], [final.spec for final in group]


def _trained_together(finals: list[_Final], n_rows: int, device: str) -> Iterator[list[list[_Final]]]:
    """Final heads of equal steps whose features fit GROUP_BYTES, grouped by how many features they keep."""
    part: list[_Final] = []
    used, limit = 0, GROUP_BYTES[torch.device(device).type]
    for final in sorted(finals, key=lambda final: final.shape):
        size = 4 * n_rows * len(final.kept)
        if part and (used + size > limit or final.spec.steps != part[0].spec.steps):
            yield _by_shape(part)
            part, used = [], 0
        part.append(final)
        used += size
    if part:
        yield _by_shape(part)


def _by_shape(finals: list[_Final]) -> list[list[_Final]]:
    return [list(group) for _, group in groupby(finals, lambda final: final.shape)]


def _head(
    point: Hyperparameters,
    seed: int,
    kept: np.ndarray,
    layout: FeatureLayout,
    stack: HeadStack,
    position: int,
) -> Head:
    weight = stack.weight[position].cpu().contiguous().numpy()
    bias = stack.bias[position].cpu().numpy()
    return Head(point, seed, kept, layout, weight, bias, float(stack.train_loss[position]))


@dataclass(frozen=True)
class _SharedKept:
    """Heads on the same kept features: their weights side by side, [n_kept, n_heads * n_classes]."""

    target_size: int
    layout: FeatureLayout
    kept: np.ndarray
    weight: Tensor
    bias: Tensor
    positions: list[int]

    def logits(self, features: Tensor) -> Tensor:
        """[b, n_heads, n_classes] of raw features [b, n_features]."""
        if len(self.kept) == self.layout.n_features:
            values = unit_norm(features, self.layout)  # without a copy of the features
        else:
            values = keep_features(features, self.layout, self.kept)
        return torch.addmm(self.bias, values, self.weight).unflatten(1, (len(self.positions), -1))


class HeadBank:
    """Heads of one task on one device; those that keep the same features share selection and product."""

    def __init__(self, heads: Sequence[Head], device: str = "cpu") -> None:
        by_kept: dict[tuple[int, bytes], list[int]] = {}
        for position, head in enumerate(heads):
            key = head.hyperparameters.target_size, head.kept.tobytes()
            by_kept.setdefault(key, []).append(position)
        self.n_heads, self.n_classes = len(heads), len(heads[0].bias)
        self.target_sizes = sorted({head.hyperparameters.target_size for head in heads})
        self.groups = [_side_by_side(heads, positions, device) for positions in by_kept.values()]

    def logits(self, features: Mapping[int, Tensor]) -> np.ndarray:
        """Logits float32 [n_heads, b, n_classes] of raw features: float32 [b, n_features] per target size."""
        n_images = next(iter(features.values())).shape[0]
        logits = np.empty((self.n_heads, n_images, self.n_classes), np.float32)
        for group in self.groups:
            of_group = group.logits(features[group.target_size])
            logits[group.positions] = of_group.transpose(0, 1).cpu().numpy()
        return logits


def _side_by_side(heads: Sequence[Head], positions: list[int], device: str) -> _SharedKept:
    members = [heads[position] for position in positions]
    weight = torch.from_numpy(np.concatenate([head.weight for head in members], axis=1)).to(device)
    bias = torch.from_numpy(np.concatenate([head.bias for head in members])).to(device)
    first = members[0]
    size = first.hyperparameters.target_size
    return _SharedKept(size, first.layout, first.kept, weight, bias, positions)
