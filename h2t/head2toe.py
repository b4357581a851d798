"""The methods that are compared, as data; their search spaces; and the training of their heads.

Sections 3 and 4 and Appendix A of the paper.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from h2t.errors import UserError, unknown
from h2t.features import FeatureLayout, select, unit_norm
from h2t.heads.blocks import HeadStack
from h2t.heads.spec import HeadSpec, Precision
from h2t.heads.training import train_groups, train_stacks
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS, find_method
from h2t.selection import keep_top, relevance_scores

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

    settings: Hyperparameters
    seed: int
    kept: np.ndarray
    layout: FeatureLayout
    weight: np.ndarray
    bias: np.ndarray
    train_loss: float


def predict(head: Head, features: np.ndarray) -> np.ndarray:
    """Logits float32 [n, n_classes] of raw features float32 [n, n_features], all of the head's layout."""
    return select(features, head.layout, head.kept) @ head.weight + head.bias


@dataclass(frozen=True)
class _Data:
    """What all heads of a call share; ``rows`` are those of ``features`` to train on, in order."""

    features: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    layout: FeatureLayout
    memory_budget: int | None
    options: dict[str, Any]


# Trainings on features before any selection, each with the settings that use it, as the result or for the
# scores.
_Plan = dict[HeadSpec, list[Hyperparameters]]


class _Final(NamedTuple):
    """A head to be trained on what the scoring phase has selected."""

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
    settings: Sequence[Hyperparameters],
    *,
    n_classes: int,
    embedding: str,
    seeds: Sequence[int] = (0,),
    rows: np.ndarray | None = None,
    batch_size: int = 128,
    memory_budget: int | None = None,
    device: str = "cpu",
    dtype: Precision = "float32",
) -> Iterator[Head]:
    """Train a head for every setting and seed; each is yielded as soon as it is done.

    ``features`` float32 [n, n_features] raw, never written; ``labels`` integer [n]; ``rows`` int64 [n_rows]
    are those to train on, in this order (default: all). All settings have the same target size, that of the
    features. ``embedding`` names the tap that methods on the embedding use. ``memory_budget`` in bytes bounds
    what is allocated here on top of one normalised copy of the training rows.

    Methods with the same training on all features share it: ``all_l21`` and the scoring phase of ``head2toe``
    of the same rate, steps, coefficient and seed, for all fractions. The other settings of a call change a
    head only through float32 rounding.

    Raises UserError, before any training, for settings, labels or features that cannot be used.
    """
    check_settings(settings, layout)
    if embedding not in layout.taps:
        raise unknown("tap", embedding, layout.taps)
    labels = np.asarray(labels)
    rows = np.arange(len(labels)) if rows is None else np.asarray(rows)
    options = {"n_classes": n_classes, "batch_size": batch_size, "device": device, "dtype": dtype}
    data = _Data(features, rows, labels[rows], layout, memory_budget, options)
    on_embedding = [point for point in settings if METHODS[point.method].features == "embedding"]
    on_all = [point for point in settings if METHODS[point.method].features != "embedding"]
    return chain(
        _fit_columns(data, _plan(on_embedding, seeds), layout.slices[layout.taps.index(embedding)]),
        _fit_columns(data, _plan(on_all, seeds), slice(0, layout.n_features)),
    )


def check_settings(settings: Sequence[Hyperparameters], layout: FeatureLayout) -> None:
    """Raises UserError for settings that cannot be trained together on features of that layout."""
    if len({point.target_size for point in settings}) > 1:
        raise UserError("expected settings of one target size: they are trained on the same features")
    for point in settings:
        if find_method(point.method).trains_backbone:
            raise UserError(f"{point.method} trains the backbone; expected a method on frozen features")
        if not 0 < point.keep_fraction <= 1 or not int(layout.n_features * point.keep_fraction):
            raise UserError(
                f"keep_fraction {point.keep_fraction} keeps none of {layout.n_features} features; "
                f"expected {1 / layout.n_features:.2g} to 1"
            )


def _plan(settings: Sequence[Hyperparameters], seeds: Sequence[int]) -> _Plan:
    plan: _Plan = {}
    for seed, point in product(seeds, settings):
        regularizer = METHODS[point.method].regularizer
        spec = HeadSpec(point.learning_rate, point.steps, regularizer, point.coefficient, seed)
        plan.setdefault(spec, []).append(point)
    return plan


def _fit_columns(data: _Data, plan: _Plan, columns: slice) -> Iterator[Head]:
    """Heads on a range of the features, then those on what they select."""
    if not plan:
        return
    specs, kept = list(plan), np.arange(columns.start, columns.stop, dtype=np.int64)
    inputs = _inputs(data, columns, kept)
    finals: list[_Final] = []
    for heads, stack in train_stacks(
        inputs, data.labels, specs, memory_budget=data.memory_budget, **data.options
    ):
        for place, spec in enumerate(specs[head] for head in heads):
            for point in plan[spec]:
                if METHODS[point.method].features != "selected":
                    yield _head(point, spec.seed, kept, data.layout, stack, place)
            finals += _finals(spec, plan[spec], stack.weight[place])
    del inputs
    yield from _fit_selected(data, finals)


def _finals(spec: HeadSpec, points: Sequence[Hyperparameters], weight: torch.Tensor) -> list[_Final]:
    """The final heads that follow a scoring phase: same rate, steps and seed, no regularizer."""
    points = [point for point in points if METHODS[point.method].features == "selected"]
    if not points:
        return []
    scores, final = relevance_scores(weight), HeadSpec(spec.learning_rate, spec.steps, seed=spec.seed)
    return [_Final(final, point, keep_top(scores, point.keep_fraction)) for point in points]


def _fit_selected(data: _Data, finals: list[_Final]) -> Iterator[Head]:
    """Final heads, each on its own features; those of equal steps are trained side by side."""
    for together in _trained_together(finals, len(data.rows), data.options["device"]):
        inputs = [np.stack([_inputs(data, final.kept, final.kept) for final in group]) for group in together]
        specs = [[final.spec for final in group] for group in together]
        # Products this small gain nothing from bfloat16.
        options = {**data.options, "dtype": "float32"}
        stacks = train_groups(list(zip(inputs, specs, strict=True)), data.labels, **options)
        for group, stack in zip(together, stacks, strict=True):
            for place, final in enumerate(group):
                yield _head(final.point, final.spec.seed, final.kept, data.layout, stack, place)


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


def _inputs(data: _Data, columns: slice | np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The kept features of the training rows with unit norm per tap, a new float32 [n_rows, n_kept]."""
    rows = data.rows if isinstance(columns, slice) else data.rows[:, None]
    chosen = np.asarray(data.features[rows, columns], np.float32)
    widths = np.bincount(data.layout.tap_of(kept), minlength=len(data.layout.taps))
    return unit_norm(chosen, FeatureLayout(data.layout.taps, tuple(widths.tolist())), out=chosen)


def _head(
    point: Hyperparameters, seed: int, kept: np.ndarray, layout: FeatureLayout, stack: HeadStack, place: int
) -> Head:
    weight = stack.weight[place].cpu().contiguous().numpy()
    bias = stack.bias[place].cpu().numpy()
    return Head(point, seed, kept, layout, weight, bias, float(stack.train_loss[place]))


@dataclass(frozen=True)
class _Group:
    """Heads on the same kept features: their weights side by side, [n_kept, n_heads * n_classes]."""

    target_size: int
    layout: FeatureLayout
    kept: np.ndarray
    weight: Tensor
    bias: Tensor
    places: list[int]

    def logits(self, features: Tensor) -> Tensor:
        """[b, n_heads, n_classes] of raw features [b, n_features]."""
        everything = len(self.kept) == self.layout.n_features
        chosen = unit_norm(features, self.layout) if everything else select(features, self.layout, self.kept)
        return torch.addmm(self.bias, chosen, self.weight).unflatten(1, (len(self.places), -1))


class HeadBank:
    """Heads of one task on one device; those that keep the same features share selection and product."""

    def __init__(self, heads: Sequence[Head], device: str = "cpu") -> None:
        grouped: dict[tuple[int, bytes], list[int]] = {}
        for place, head in enumerate(heads):
            grouped.setdefault((head.settings.target_size, head.kept.tobytes()), []).append(place)
        self.n_heads = len(heads)
        self.target_sizes = sorted({head.settings.target_size for head in heads})
        self.groups = [_group(heads, places, device) for places in grouped.values()]

    def predict(self, features: Mapping[int, Tensor]) -> np.ndarray:
        """Predicted classes int32 [b, n_heads] of raw features: float32 [b, n_features] per target size."""
        size = next(iter(features.values())).shape[0]
        predictions = np.empty((size, self.n_heads), np.int32)
        for group in self.groups:
            classes = group.logits(features[group.target_size]).argmax(2)
            predictions[:, group.places] = classes.cpu().numpy()
        return predictions


def _group(heads: Sequence[Head], places: list[int], device: str) -> _Group:
    heads = [heads[place] for place in places]
    first = heads[0]
    weight = torch.from_numpy(np.concatenate([head.weight for head in heads], axis=1)).to(device)
    bias = torch.from_numpy(np.concatenate([head.bias for head in heads])).to(device)
    return _Group(first.settings.target_size, first.layout, first.kept, weight, bias, places)
