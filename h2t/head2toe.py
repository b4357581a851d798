"""Head2Toe and its baselines on frozen features: score, keep, train the final head (Section 3.2)."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from h2t.errors import UserError, unknown
from h2t.features import FeatureLayout, TapFeatures, keep_features, unit_norm
from h2t.heads.blocks import HeadStack
from h2t.heads.neighbours import Neighbours, head_logits
from h2t.heads.solution import Problem
from h2t.heads.solvers import SOLVERS
from h2t.heads.spec import HeadSpec, Normalization, Precision
from h2t.heads.tap_kernels import of_rows
from h2t.heads.training import train_groups, train_stacks
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS, find_method
from h2t.metrics import cross_entropy
from h2t.selection import DATA_RULES, WEIGHT_RULES, keep_top

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
    rows, nats. ``raw``: the head reads features as they are, without unit norm per tap. ``neighbours``: the
    columns of weight and bias are training rows, which vote.
    """

    hyperparameters: Hyperparameters
    seed: int
    kept: np.ndarray
    layout: FeatureLayout
    weight: np.ndarray
    bias: np.ndarray
    train_loss: float
    raw: bool = False
    neighbours: Neighbours | None = None

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return self.neighbours.n_classes if self.neighbours else len(self.bias)

    def restricted(self, taps: Collection[str]) -> "Head":
        """The same head on features of some taps alone, which have all that it keeps."""
        inside = [name in taps for name in self.layout.taps]
        pairs = zip(self.layout.taps, self.layout.widths, strict=True)
        names, widths = zip(*(pair for pair, there in zip(pairs, inside, strict=True) if there), strict=True)
        before = np.cumsum(np.where(inside, 0, self.layout.widths))  # columns that fall away up to each tap
        kept = self.kept - before[self.layout.tap_of(self.kept)]
        return replace(self, kept=kept, layout=FeatureLayout(names, widths))

    def taps_read(self) -> tuple[str, ...]:
        """The taps with a kept feature, in network order."""
        return tuple(self.layout.taps[tap] for tap in np.unique(self.layout.tap_of(self.kept)))

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Logits float32 [n, n_classes] of the kept features float32 [n, n_kept], normalised."""
        return head_logits(inputs, self.weight, self.bias, self.neighbours)


def logits(head: Head, features: np.ndarray | TapFeatures, rows: np.ndarray | None = None) -> np.ndarray:
    """Logits float32 [n, n_classes] of raw features float32 [n, n_features], all of the head's layout.

    ``rows``: of the features (default: all). Features that lie elsewhere are read tap by tap.
    """
    if head.neighbours or isinstance(features, np.ndarray):
        return head.logits(keep_features(features, head.layout, head.kept, rows, raw=head.raw))
    products: np.ndarray | float = 0.0
    for columns, values in features.kept(head.layout, head.kept, rows):
        if not head.raw:
            values = unit_norm(values, FeatureLayout(("tap",), values.shape[1:]))
        products = products + values @ head.weight[columns]
    return products + head.bias


VARIANCE_FLOOR = 1e-5
"""Added to a feature's variance where each is normalised by itself, as in the official code."""


@dataclass(frozen=True)
class _Data:
    """Everything that the heads of a call share; ``rows``: those of ``features`` to train on.

    ``center``, ``scale``: float32 [n_features], of features that are normalised each by itself; ``products``:
    from a tap to those of all of its features, see ``fit``.
    """

    features: np.ndarray | TapFeatures
    labels: np.ndarray
    rows: np.ndarray
    layout: FeatureLayout
    memory_budget: int | None
    shuffle: Sequence[int] | None
    options: dict[str, Any]
    normalization: Normalization = "unit"
    center: np.ndarray | None = None
    scale: np.ndarray | None = None
    products: Callable[[int], np.ndarray] | None = None

    def normalized(self, normalization: Normalization) -> "_Data":
        """The same with features normalised in that way."""
        if normalization != "per_feature":
            return replace(self, normalization=normalization)
        every = np.arange(self.layout.n_features)
        values = keep_features(self.features, self.layout, every, self.rows, raw=True)
        center, scale = values.mean(0), np.sqrt(values.var(0) + np.float32(VARIANCE_FLOOR))
        return replace(self, normalization=normalization, center=center, scale=scale)

    def order(self, seed: int, phase: Phase) -> np.ndarray:
        """The rows in the order in which a phase of the training with that seed takes them, int64."""
        if self.shuffle is None:
            return self.rows
        generator = np.random.default_rng([*self.shuffle, seed, PHASES.index(phase)])
        return generator.permutation(self.rows)

    def inputs(self, kept: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The kept features of rows, normalised, a new float32 [n_rows, n_kept]."""
        raw = self.normalization != "unit"
        values = keep_features(self.features, self.layout, kept, order, raw=raw)
        if self.center is not None and self.scale is not None:
            values -= self.center[kept]
            values /= self.scale[kept]
        return values

    def problem(self, columns: slice) -> Problem:
        """What a head on a range of the features is to be solved for."""
        every = np.arange(columns.start, columns.stop, dtype=np.int64)
        whole = (columns.start, columns.stop) == (0, self.layout.n_features)
        return Problem(
            lambda part: self.inputs(every[part], self.rows),
            self.labels[self.rows],
            self.options["n_classes"],
            self.layout.of_kept(every),
            self._products_of_rows if self.products and whole else None,
            self.options["device"],
        )

    def problem_on_kept(self, kept: np.ndarray) -> Problem:
        """What a head on kept features is to be solved for."""
        labels, n_classes = self.labels[self.rows], self.options["n_classes"]
        values = self.inputs(kept, self.rows)
        return Problem.of(values, labels, n_classes, self.layout.of_kept(kept), self.options["device"])

    def _products_of_rows(self, tap: int) -> np.ndarray:
        assert self.products
        return of_rows(self.products(tap), self.rows)

    def head(
        self,
        point: Hyperparameters,
        seed: int,
        kept: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray,
        train_loss: float,
        neighbours: Neighbours | None = None,
    ) -> Head:
        """A head on features as they are: mean and variance of each go into weight and bias."""
        raw = self.normalization != "unit"
        if self.center is not None and self.scale is not None:
            weight = weight / self.scale[kept, None]
            bias = bias - self.center[kept] @ weight
        return Head(point, seed, kept, self.layout, weight, bias, train_loss, raw, neighbours)


class _Final(NamedTuple):
    """A head to be trained on the features that a rule has kept, in a second phase."""

    spec: HeadSpec
    point: Hyperparameters
    kept: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.spec.steps, len(self.kept)


def fit(
    features: np.ndarray | TapFeatures,
    labels: np.ndarray,
    layout: FeatureLayout,
    hyperparameters: Sequence[Hyperparameters],
    *,
    n_classes: int,
    embedding: str,
    seeds: Sequence[int] = (0,),
    rows: np.ndarray | None = None,
    taps: Sequence[str] | None = None,
    kept: Mapping[int, np.ndarray] | None = None,
    products: Callable[[int], np.ndarray] | None = None,
    shuffle: Sequence[int] | None = None,
    batch_size: int = 128,
    memory_budget: int | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
) -> Iterator[Head]:
    """Train a head for every point of ``hyperparameters`` and seed; each is yielded as soon as it is done.

    ``features`` float32 or float16 [n, n_features] raw, never written; ``labels`` integer [n]; ``rows``
    int64 [n_rows] are those to train on (default: all). All points have the features' target size.
    ``embedding`` names the tap that methods on the embedding use. ``memory_budget`` in bytes bounds what is
    allocated here on top of one normalised copy of the training rows.

    ``taps``: the only ones whose features are candidates (default: all); heads are of the whole layout all
    the same. ``kept``: seed -> int64 [n_kept], features to train final heads on in place of those that a
    point's rule would keep.

    Features that lie elsewhere are read tap by tap by the solver of tap kernels; every other method takes
    them to memory, all together. ``products``: from a tap to the products float32 [n, n] of its features less
    their means, if they are known; tap kernels begin with these.

    ``shuffle``: numbers that, with the seed of a head, draw the order of its rows, which each of the two
    phases repeats until its steps are done; so the official code has it, which reads the images in a new
    order whenever it computes their features. None takes the rows as they come.

    Methods with the same training on all features share it: ``all_l21`` and the scoring phase of ``head2toe``
    of the same rate, steps, coefficient and seed, for all fractions. The other points and seeds of a call
    change no bit of a head on a CPU with one thread; ``h2t.heads.trainer`` says where they may.

    Raises UserError, before any training, for hyperparameters, labels or features that cannot be used.
    """
    whole, columns = layout, None
    labels = np.asarray(labels)
    if not isinstance(features, TapFeatures):
        features = np.asarray(features)
        if features.dtype != np.float16:  # which becomes float32 where rows of it are normalised
            features = np.asarray(features, np.float32)
    if taps is not None:
        columns = columns_of(layout, taps)
        if not isinstance(features, TapFeatures):
            features = features[:, columns]
        layout, products = _part(layout, taps), None
    check_hyperparameters(hyperparameters, layout)
    on_embedding = [point for point in hyperparameters if METHODS[point.method].features == "embedding"]
    if embedding not in layout.taps and (on_embedding or taps is None):
        raise unknown("tap", embedding, layout.taps)
    rows = np.arange(len(labels)) if rows is None else np.asarray(rows)
    options = {"n_classes": n_classes, "batch_size": batch_size, "device": device, "precision": precision}
    data = _Data(features, labels, rows, layout, memory_budget, shuffle, options, products=products)
    heads = _fit_given(data, hyperparameters, kept) if kept else _fit(data, hyperparameters, seeds, embedding)
    if columns is None:
        return heads
    return (replace(head, kept=columns[head.kept], layout=whole) for head in heads)


def columns_of(layout: FeatureLayout, taps: Sequence[str]) -> np.ndarray:
    """The columns of some taps, int64 ascending. Raises UserError for an unknown tap."""
    for tap in taps:
        if tap not in layout.taps:
            raise unknown("tap", tap, layout.taps)
    named = zip(layout.taps, layout.slices, strict=True)
    return np.concatenate([np.arange(part.start, part.stop) for tap, part in named if tap in taps])


def _part(layout: FeatureLayout, taps: Sequence[str]) -> FeatureLayout:
    named = [pair for pair in zip(layout.taps, layout.widths, strict=True) if pair[0] in taps]
    names, widths = zip(*named, strict=True)
    return FeatureLayout(names, widths)


def _fit(
    data: _Data, points: Sequence[Hyperparameters], seeds: Sequence[int], embedding: str
) -> Iterator[Head]:
    """Train heads, together where they read the same features."""

    def kind(point: Hyperparameters) -> tuple[bool, bool, Normalization]:
        method = METHODS[point.method]
        return method.features != "embedding", method.solver is None, method.normalization

    layout = data.layout
    for (on_all, trained, normalization), group in groupby(sorted(points, key=kind), kind):
        columns = slice(0, layout.n_features) if on_all else layout.slices[layout.taps.index(embedding)]
        fit_columns = _fit_columns if trained else _solve_columns
        yield from fit_columns(data.normalized(normalization), list(group), seeds, columns)


def _fit_given(
    data: _Data, points: Sequence[Hyperparameters], kept: Mapping[int, np.ndarray]
) -> Iterator[Head]:
    """Train final heads on features that are given, by seed."""
    finals = [
        _Final(HeadSpec(point.learning_rate, point.steps, seed=seed), point, features)
        for point in points
        for seed, features in kept.items()
    ]
    yield from _fit_kept(data, finals)


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
        if point.offset + int(layout.n_features * point.keep_fraction) > layout.n_features:
            raise UserError(
                f"offset {point.offset} and keep_fraction {point.keep_fraction} reach beyond the "
                f"{layout.n_features} features that there are"
            )


def _solve_columns(
    data: _Data, points: Sequence[Hyperparameters], seeds: Sequence[int], columns: slice
) -> Iterator[Head]:
    """Solve for heads on a range of the features, or on what they keep; they are the same for every seed."""
    every = np.arange(columns.start, columns.stop, dtype=np.int64)
    problem, labels = data.problem(columns), data.labels[data.rows]

    def solver_of(point: Hyperparameters) -> str:
        return str(METHODS[point.method].solver)

    for solver, group in groupby(sorted(points, key=solver_of), solver_of):
        members = list(group)
        coefficients = sorted({point.coefficient for point in members})
        solutions = SOLVERS[solver](problem, coefficients)
        for coefficient, solution in zip(coefficients, solutions, strict=True):
            for point in (point for point in members if point.coefficient == coefficient):
                kept, found = every, solution
                if METHODS[point.method].features == "kept":
                    assert solution.on_kept, f"{solver} has nothing to solve with on kept features"
                    assert solution.contributions is not None
                    kept = keep_top(solution.contributions, point.keep_fraction, point.offset)
                    found = solution.on_kept(data.problem_on_kept(kept), solution.contributions[kept])
                outputs = found.outputs
                if outputs is None:
                    outputs = head_logits(problem.features, *found[:3])
                loss = cross_entropy(outputs, labels)
                for seed in seeds:
                    yield data.head(point, seed, kept, found.weight, found.bias, loss, found.neighbours)


def _fit_columns(
    data: _Data, points: Sequence[Hyperparameters], seeds: Sequence[int], columns: slice
) -> Iterator[Head]:
    """Train heads on a range of the features, then those on what they keep."""
    columns_kept = np.arange(columns.start, columns.stop, dtype=np.int64)
    by_data = [point for point in points if METHODS[point.method].selection in DATA_RULES]
    finals = _finals_by_data(data, by_data, seeds, columns_kept) if by_data else []
    for seed in seeds:
        by_spec: dict[HeadSpec, list[Hyperparameters]] = {}  # what uses a training: its head or its scores
        for point in points:
            if point not in by_data:
                method = METHODS[point.method]
                spec = HeadSpec(point.learning_rate, point.steps, method.regularizer, point.coefficient, seed)
                by_spec.setdefault(spec, []).append(point)
        for spec, stack, position in _fit_specs(data, list(by_spec), columns_kept):
            for point in by_spec[spec]:
                if METHODS[point.method].features == "kept":
                    scored_by = WEIGHT_RULES[str(METHODS[point.method].selection)]
                    finals += _finals([point], seed, scored_by(stack.weight[position], data.layout))
                else:
                    yield _head(data, point, seed, columns_kept, stack, position)
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


def _finals_by_data(
    data: _Data, points: Sequence[Hyperparameters], seeds: Sequence[int], columns: np.ndarray
) -> list[_Final]:
    """The final heads on what rules keep by the training rows alone, which are normalised once for all."""
    inputs, labels = data.inputs(columns, data.rows), data.labels[data.rows]
    by_rule: dict[str, list[Hyperparameters]] = {}
    for point in points:
        by_rule.setdefault(str(METHODS[point.method].selection), []).append(point)
    return [
        final
        for rule, members in by_rule.items()
        for seed in seeds
        for final in _finals(members, seed, DATA_RULES[rule](inputs, labels, seed))
    ]


def _finals(points: Iterable[Hyperparameters], seed: int, scores: np.ndarray) -> list[_Final]:
    """The final heads that follow on scores: same rate, steps and seed, no regularizer."""
    return [
        _Final(
            HeadSpec(point.learning_rate, point.steps, seed=seed),
            point,
            keep_top(scores, point.keep_fraction, point.offset),
        )
        for point in points
    ]


def _fit_kept(data: _Data, finals: list[_Final]) -> Iterator[Head]:
    """Train final heads, each on its kept features; those of equal steps are trained side by side."""
    for groups in _trained_together(finals, len(data.rows), data.options["device"]):
        # Products this small gain nothing from bfloat16.
        options = {**data.options, "precision": "float32"}
        stacks = train_groups([_with_inputs(data, group) for group in groups], **options)
        for group, stack in zip(groups, stacks, strict=True):
            for position, final in enumerate(group):
                yield _head(data, final.point, final.spec.seed, final.kept, stack, position)


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
    data: _Data, point: Hyperparameters, seed: int, kept: np.ndarray, stack: HeadStack, position: int
) -> Head:
    weight = stack.weight[position].cpu().contiguous().numpy()
    bias = stack.bias[position].cpu().numpy()
    return data.head(point, seed, kept, weight, bias, float(stack.train_loss[position]))


@dataclass(frozen=True)
class _SharedKept:
    """Heads on the same kept features: their weights side by side, [n_kept, n_heads * n_classes].

    ``neighbours``: how the columns of a single head, which are training rows, vote.
    """

    target_size: int
    layout: FeatureLayout
    kept: np.ndarray
    weight: Tensor
    bias: Tensor
    positions: list[int]
    raw: bool
    neighbours: Neighbours | None

    def logits(self, features: Tensor) -> np.ndarray:
        """[n_heads, b, n_classes] of raw features [b, n_features]."""
        if len(self.kept) < self.layout.n_features:
            values = keep_features(features, self.layout, self.kept, raw=self.raw)
        else:  # without a copy of the features
            values = features if self.raw else unit_norm(features, self.layout)
        outputs = torch.addmm(self.bias, values, self.weight)
        if self.neighbours:
            return self.neighbours.logits(outputs.cpu().numpy())[None]
        return outputs.unflatten(1, (len(self.positions), -1)).transpose(0, 1).cpu().numpy()


class HeadBank:
    """Heads of one task on one device; those that keep the same features share selection and product."""

    def __init__(self, heads: Sequence[Head], device: str = "cpu") -> None:
        by_kept: dict[Any, list[int]] = {}
        for position, head in enumerate(heads):
            alone = position if head.neighbours else None
            key = head.hyperparameters.target_size, head.kept.tobytes(), head.raw, alone
            by_kept.setdefault(key, []).append(position)
        self.n_heads, self.n_classes = len(heads), heads[0].n_classes
        self.target_sizes = sorted({head.hyperparameters.target_size for head in heads})
        self.groups = [_side_by_side(heads, positions, device) for positions in by_kept.values()]

    def logits(self, features: Mapping[int, Tensor]) -> np.ndarray:
        """Logits float32 [n_heads, b, n_classes] of raw features: float32 [b, n_features] per target size."""
        n_images = next(iter(features.values())).shape[0]
        logits = np.empty((self.n_heads, n_images, self.n_classes), np.float32)
        for group in self.groups:
            logits[group.positions] = group.logits(features[group.target_size])
        return logits


def _side_by_side(heads: Sequence[Head], positions: list[int], device: str) -> _SharedKept:
    members = [heads[position] for position in positions]
    weight = torch.from_numpy(np.concatenate([head.weight for head in members], axis=1)).to(device)
    bias = torch.from_numpy(np.concatenate([head.bias for head in members])).to(device)
    first = members[0]
    size = first.hyperparameters.target_size
    return _SharedKept(size, first.layout, first.kept, weight, bias, positions, first.raw, first.neighbours)
