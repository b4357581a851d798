"""The head trainer against the official code's trajectories, and what must hold for any data."""

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from h2t.errors import UserError
from h2t.features import FeatureLayout, unit_norm
from h2t.heads import trainer as head_trainer
from h2t.heads.blocks import HeadGroup, HeadStack, initial_weights
from h2t.heads.spec import HeadSpec, Precision, Regularizer
from h2t.heads.trainer import BETA1, BETA2, EPSILON, Batches, HeadTrainer
from h2t.heads.training import train_groups, train_heads, train_stacks
from h2t.selection import keep_top, relevance_scores

GOLDENS = Path(__file__).parents[2] / "goldens"
ARRAYS = np.load(GOLDENS / "traj.npz")
NOTES = json.loads((GOLDENS / "traj.json").read_text())
LAYERS = np.load(GOLDENS / "layers.npz")
WIDTHS = tuple(NOTES["layer_sizes"])
TAPS = FeatureLayout(tuple(map(str, range(len(WIDTHS)))), WIDTHS)
REGULARIZERS = {"l1_regularizer": "l1", "l2_regularizer": "l2", "group_lrp_regularizer_coef": "l21"}
# Largest difference of a weight after all 200 steps, where it may be larger than early on: rounding decides
# the sign of a weight near zero under l1, and which rows a group lasso at a high rate pushes to zero.
FINAL = {"l1_1e-3_lr0.01": 2e-3, "gl_1e-3_lr0.01": 3.4e-5, "gl_1e-3_lr0.1": 4e-3}


def golden_spec(case: str) -> HeadSpec:
    overrides = NOTES["cases"][case]["overrides"]
    penalty = [(REGULARIZERS[key], value) for key, value in overrides.items() if key in REGULARIZERS]
    return HeadSpec(overrides["learning_rate"], NOTES["cosine_horizon_T"], *(penalty or [(None, 0.0)])[0])


def golden_features(case: str) -> np.ndarray:
    features = ARRAYS["X"]
    if case.startswith("perfeature"):
        return (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-5)
    return unit_norm(features, TAPS)


def golden_trainer(case: str, spec: HeadSpec) -> HeadTrainer:
    rows, labels = torch.from_numpy(golden_features(case)), torch.from_numpy(ARRAYS["y"].astype(np.int64))
    start = torch.from_numpy(ARRAYS["W0"])[None], torch.from_numpy(ARRAYS["b0"])[None]
    batches = Batches(labels, NOTES["classes"], NOTES["batch"])
    return HeadTrainer(batches, [HeadGroup(rows, [spec], TAPS, *start)])


@pytest.mark.parametrize("case", NOTES["cases"])
def test_follows_the_official_trajectory(case: str) -> None:
    spec = golden_spec(case)
    trainer = golden_trainer(case, spec)
    early = 1e-5 if spec.learning_rate == 0.1 else 2e-6
    tolerance = {1: early, 10: early, 200: FINAL.get(case, 6e-6)}
    for step in range(spec.steps):
        trainer.step(step)
        if step + 1 in tolerance:
            expected = ARRAYS[f"{case}/W_{step + 1}"]
            np.testing.assert_allclose(trainer.weight()[0][0], expected, atol=tolerance[step + 1], rtol=0)


def test_group_norms_of_taps_follow_the_official_trajectory() -> None:
    """The official code ignores the coefficient of this penalty: its 1e-3 is our 1."""
    trainer = golden_trainer("none", HeadSpec(0.01, NOTES["cosine_horizon_T"], "layergroup", 1.0))
    for step in range(10):
        trainer.step(step)
        if step + 1 in (1, 10):
            expected = LAYERS[f"glembed_1e-3_lr0.01/W_{step + 1}"]
            np.testing.assert_allclose(trainer.weight()[0][0], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", NOTES["cases"])
@pytest.mark.parametrize("fraction", ["0.01", "0.05", "0.2"])
def test_keeps_what_the_official_code_keeps(case: str, fraction: str) -> None:
    (trained,) = golden_trainer(case, golden_spec(case)).train()
    kept = keep_top(relevance_scores(trained.weight[0]), float(fraction))
    official = ARRAYS[f"{case}/kept_connectivity_l2_F{fraction}"]
    overlap = NOTES["cases"][case]["overlap"][f"F{fraction}"]
    assert len(np.intersect1d(kept, official)) >= int(overlap * len(official))
    assert len(kept) == len(official)


def example(
    n: int = 200, n_features: int = 90, n_classes: int = 4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, n_classes, n)
    features = generator.normal(size=(n, n_features)) + generator.normal(size=(n_classes, n_features))[labels]
    return features.astype(np.float32) / 10, labels


MIXED = [
    HeadSpec(0.01, 30, "l21", 1e-3, seed=3),
    HeadSpec(0.1, 12),
    HeadSpec(0.1, 30, "l1", 1e-4, seed=1),
    HeadSpec(0.01, 30, "l2", 1e-2),
    HeadSpec(0.03, 30, "l21", 1e-5, seed=2),
    HeadSpec(0.01, 12, "l1", 1e-3),
    HeadSpec(0.05, 30, "l1", 0.0),
    HeadSpec(0.02, 30, "layergroup", 1e-2, seed=4),
    HeadSpec(0.1, 30, "layergroup", 1e-3, seed=5),
]


def train_as_keras(
    features: np.ndarray, labels: np.ndarray, spec: HeadSpec, layout: FeatureLayout
) -> HeadStack:
    """Train one head with autograd and ``torch.optim.Adam``, whose epsilon is made Keras's, in float64."""
    penalties: dict[Regularizer | None, Callable[[torch.Tensor], torch.Tensor]] = {
        None: lambda weight: weight.new_zeros(()),
        "l1": lambda weight: weight.abs().sum(),
        "l2": lambda weight: weight.square().sum(),
        "l21": lambda weight: weight.norm(dim=1).sum(),
        "layergroup": lambda weight: torch.stack([weight[tap].norm() for tap in layout.slices]).sum(),
    }
    x, y = torch.from_numpy(features).double(), torch.from_numpy(labels)
    weight = torch.from_numpy(initial_weights(spec.seed, x.shape[1], 4)).double().requires_grad_()
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], betas=(BETA1, BETA2))
    batches = list(zip(x.split(128), y.split(128), strict=True))
    for step in range(spec.steps):
        optimizer.param_groups[0] |= {
            "lr": spec.learning_rate * 0.5 * (1 + math.cos(math.pi * step / spec.steps)),
            "eps": EPSILON / math.sqrt(1 - BETA2 ** (step + 1)),
        }
        rows, targets = batches[step % len(batches)]
        loss = torch.nn.functional.cross_entropy(rows @ weight + bias, targets, reduction="sum") / 128
        penalty = spec.coefficient * penalties[spec.regularizer](weight)
        optimizer.zero_grad()
        (loss + len(rows) / 128 * penalty).backward()
        optimizer.step()
    loss = torch.nn.functional.cross_entropy(x @ weight + bias, y)
    return HeadStack(*(value.detach().float() for value in (weight, bias, loss)))


@pytest.mark.parametrize("block_bytes", [None, 4 * 128 * 44])
def test_heads_are_those_of_autograd_and_pytorchs_adam(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int | None
) -> None:
    """All regularizers and rates in one stack, a short last batch, taps in several blocks."""
    features, labels = example(n_features=700)
    layout = FeatureLayout(("a", "none", "b", "c"), (100, 0, 250, 350))
    specs = [
        HeadSpec(rate, 25, regularizer, 1e-3, seed)
        for regularizer in (None, *get_args(Regularizer))
        for seed, rate in enumerate((0.1, 0.01))
    ]
    if block_bytes:
        monkeypatch.setitem(head_trainer.BLOCK_BYTES, "cpu", block_bytes)
    stack = train_heads(features, labels, specs, n_classes=4, layout=layout)
    for head, spec in enumerate(specs):
        reference = train_as_keras(features, labels, spec, layout)
        torch.testing.assert_close(
            stack.weight[head], reference.weight, atol=5e-4 * spec.learning_rate, rtol=0
        )
        torch.testing.assert_close(stack.bias[head], reference.bias, atol=5e-4 * spec.learning_rate, rtol=0)
        torch.testing.assert_close(stack.train_loss[head], reference.train_loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("regularizer", get_args(Regularizer))
def test_a_coefficient_of_zero_is_no_regularizer(regularizer: Regularizer) -> None:
    features, labels = example()
    zero, none, other = (
        train_heads(features, labels, [spec, HeadSpec(0.1, 20, regularizer, 1e-2)], n_classes=4).weight[0]
        for spec in (HeadSpec(0.1, 20, regularizer), HeadSpec(0.1, 20), HeadSpec(0.1, 20, regularizer, 1e-2))
    )
    torch.testing.assert_close(zero, none, atol=1e-6, rtol=0)
    assert not torch.allclose(none, other, atol=1e-3)


def test_a_stack_equals_single_runs() -> None:
    features, labels = example()
    stack = train_heads(features, labels, MIXED, n_classes=4)
    for head, spec in enumerate(MIXED):
        alone = train_heads(features, labels, [spec], n_classes=4)
        torch.testing.assert_close(stack.weight[head], alone.weight[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(stack.bias[head], alone.bias[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(stack.train_loss[head], alone.train_loss[0], atol=1e-5, rtol=0)


def test_the_same_call_gives_the_same_bits() -> None:
    features, labels = example()
    first, second = (train_heads(features, labels, MIXED, n_classes=4).weight for _ in range(2))
    assert torch.equal(first, second)


def test_one_matrix_per_head_equals_single_runs() -> None:
    pairs = [example(seed=seed) for seed in range(3)]
    labels = pairs[0][1]
    features = np.stack([features for features, _ in pairs])
    specs = [HeadSpec(0.1, 20), HeadSpec(0.01, 20, "l21", 1e-2), HeadSpec(0.1, 25, "l1", 1e-3)]
    stack = train_heads(features, labels, specs, n_classes=4)
    for head, spec in enumerate(specs):
        alone = train_heads(features[head], labels, [spec], n_classes=4)
        torch.testing.assert_close(stack.weight[head], alone.weight[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_groups_side_by_side_equal_their_single_runs(precision: Precision) -> None:
    labels = example()[1]
    groups = [
        (example(n_features=90)[0], [HeadSpec(0.01, 20, "l1", 1e-3), HeadSpec(0.1, 20, "l21", 1e-2)]),
        (np.stack([example(n_features=7, seed=seed)[0] for seed in range(3)]), [HeadSpec(0.1, 20)] * 3),
        (example(n_features=300)[0], [HeadSpec(0.1, 20, "l2", 1e-3)]),
    ]
    with_labels = [(features, labels, specs) for features, specs in groups]
    stacks = train_groups(with_labels, n_classes=4, precision=precision)
    for (features, specs), stack in zip(groups, stacks, strict=True):
        alone = train_heads(features, labels, specs, n_classes=4, precision=precision)
        torch.testing.assert_close(stack.weight, alone.weight, atol=2e-5, rtol=0)
        torch.testing.assert_close(stack.bias, alone.bias, atol=2e-5, rtol=0)
        torch.testing.assert_close(stack.train_loss, alone.train_loss, atol=1e-5, rtol=0)


def test_groups_of_different_steps_are_refused() -> None:
    features, labels = example()
    with pytest.raises(UserError, match="equal steps, got 5, 6"):
        train_groups([(features, labels, [HeadSpec(0.1, steps)]) for steps in (6, 5)], n_classes=4)


@pytest.mark.parametrize("block_bytes", [4 * 28 * 128, 4 * 28 * 320])
def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    features, labels = example(n_features=700)
    features = unit_norm(features, FeatureLayout(("a", "b", "c"), (100, 33, 567)))
    unblocked = train_heads(features, labels, MIXED, n_classes=4)
    monkeypatch.setitem(head_trainer.BLOCK_BYTES, "cpu", block_bytes)
    blocked = train_heads(features, labels, MIXED, n_classes=4)
    torch.testing.assert_close(blocked.weight, unblocked.weight, atol=2e-5, rtol=0)


@pytest.mark.parametrize("heads_within", [2, 1, 0])
def test_a_memory_budget_does_not_change_the_result(heads_within: int) -> None:
    features, labels = example(n_features=700)
    unbounded = train_heads(features, labels, MIXED, n_classes=4)
    budget = heads_within * 3 * 4 * 700 * 4 or 1000
    within = list(train_stacks(features, labels, MIXED, n_classes=4, memory_budget=budget))
    assert max(len(heads) for heads, _ in within) == max(heads_within, 1)
    for heads, stack in within:
        torch.testing.assert_close(stack.weight, unbounded.weight[heads], atol=2e-5, rtol=0)


def train_from(start: np.ndarray, features: np.ndarray, labels: np.ndarray, *specs: HeadSpec) -> HeadStack:
    """Train heads that all start at the weights ``start`` [n_features, n_classes]."""
    weight = torch.from_numpy(start).expand(len(specs), *start.shape)
    batches = Batches(torch.from_numpy(labels), start.shape[1], 128)
    (stack,) = HeadTrainer(batches, [HeadGroup(torch.from_numpy(features), specs, weight=weight)]).train()
    return stack


def test_permuting_features_permutes_scores() -> None:
    features, labels = example()
    order = np.random.default_rng(5).permutation(features.shape[1])
    start = initial_weights(0, features.shape[1], 4)
    spec = HeadSpec(0.01, 40, "l21", 1e-4)
    plain = train_from(start, features, labels, spec)
    moved = train_from(start[order], np.ascontiguousarray(features[:, order]), labels, spec)
    expected = relevance_scores(plain.weight[0])[order]
    np.testing.assert_allclose(relevance_scores(moved.weight[0]), expected, rtol=1e-3, atol=1e-6)


def test_weights_of_zero_stay_finite() -> None:
    features, labels = example()
    features[:, :10] = 0
    specs = [HeadSpec(0.1, 30, regularizer, 1e-2) for regularizer in get_args(Regularizer)]
    stack = train_from(np.zeros((90, 4), np.float32), features, labels, *specs)
    assert torch.isfinite(stack.weight).all()
    assert (stack.weight[:, :10] == 0).all()


def test_fewer_rows_than_a_batch_and_an_absent_class() -> None:
    features, labels = example(n=40, n_classes=3)
    stack = train_heads(features, labels, [HeadSpec(0.1, 60, "l2", 1e-4)], n_classes=6)
    logits = features @ stack.weight[0].numpy() + stack.bias[0].numpy()
    assert (logits.argmax(1) == labels).mean() > 0.9
    assert (stack.bias[0, 3:] < stack.bias[0, :3].min()).all()


def test_train_loss_is_the_mean_cross_entropy() -> None:
    features, labels = example()
    stack = train_heads(features, labels, [HeadSpec(0.1, 15)], n_classes=4)
    logits = torch.from_numpy(features) @ stack.weight[0] + stack.bias[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    torch.testing.assert_close(stack.train_loss[0], expected, atol=1e-5, rtol=0)


def test_features_are_read_only_and_unchanged() -> None:
    features, labels = example()
    before = features.copy()
    features.flags.writeable = False
    train_heads(features, labels, MIXED, n_classes=4)
    np.testing.assert_array_equal(features, before)


def test_seeds_draw_different_starts_within_the_glorot_limit() -> None:
    first, second = (initial_weights(seed, 600, 4) for seed in (0, 1))
    limit = np.sqrt(6 / 604)
    assert not np.allclose(first, second)
    assert np.abs(first).max() <= limit
    assert first.std() == pytest.approx(limit / np.sqrt(3), rel=0.05)


def test_bfloat16_products_reach_nearly_the_same_loss() -> None:
    features, labels = example()
    spec = HeadSpec(0.01, 60, "l21", 1e-4)
    full = train_heads(features, labels, [spec], n_classes=4)
    half = train_heads(features, labels, [spec], n_classes=4, precision="bfloat16")
    assert not torch.equal(full.weight, half.weight)
    torch.testing.assert_close(half.train_loss, full.train_loss, rtol=0.02, atol=0)


def test_tf32_is_allowed_during_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = HeadTrainer.step

    def watched(trainer: HeadTrainer, number: int) -> None:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        step(trainer, number)

    monkeypatch.setattr(HeadTrainer, "step", watched)
    features, labels = example()
    train_heads(features, labels, [HeadSpec(0.1, 1)], n_classes=4, precision="tf32")
    train_heads(features, labels, [HeadSpec(0.1, 1)], n_classes=4)
    assert seen == [True, False]
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.full(200, 4)}, r"labels in 0\.\.3"),
        ({"labels": np.full(200, -1)}, r"labels in 0\.\.3"),
        ({"labels": np.zeros(200)}, "integer labels"),
        ({"labels": np.zeros(199, int)}, "expected features"),
        ({"features": np.zeros((0, 90), np.float32), "labels": np.zeros(0, int)}, "at least one row"),
        ({"features": np.full((200, 90), np.nan, np.float32)}, "NaN or infinity in row 0"),
        ({"specs": [HeadSpec(0.1, 0)]}, "steps >= 1"),
        ({"specs": [HeadSpec(0.0, 5)]}, "learning_rate > 0"),
        ({"specs": []}, "one spec"),
        ({"layout": FeatureLayout(("a",), (80,))}, "the layout's 80 features, got 90"),
        ({"specs": [HeadSpec(0.1, 5, "l3")]}, "unknown regularizer 'l3'"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_used_is_refused(change: dict, message: str) -> None:
    features, labels = example()
    arguments = {"features": features, "labels": labels, "specs": MIXED, "n_classes": 4} | change
    with pytest.raises(UserError, match=message):
        train_heads(**arguments)


def test_infinity_is_named_by_its_row() -> None:
    features, labels = example()
    features[5, 3] = np.inf
    with pytest.raises(UserError, match="row 5"):
        train_heads(features, labels, MIXED, n_classes=4)


def bitwise_equal(first: HeadStack, second: HeadStack) -> bool:
    parts = ("weight", "bias", "train_loss")
    return all(torch.equal(getattr(first, part), getattr(second, part)) for part in parts)


@pytest.mark.parametrize(("n_classes", "n_features"), [(2, 700), (3, 131), (10, 1500), (37, 64)])
@pytest.mark.parametrize("batch_size", [128, 20])
def test_company_changes_no_bit_of_a_head(n_classes: int, n_features: int, batch_size: int) -> None:
    """Whichever heads are trained beside it, and within whatever memory."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(150, n_features)).astype(np.float32)
    labels = np.arange(150) % n_classes
    regularizers: list[tuple[Regularizer | None, float]] = [
        (None, 0), ("l1", 1e-3), ("l2", 1e-3), ("l21", 1e-3), ("layergroup", 1e-2)
    ]  # fmt: skip
    rates = (0.1, 0.03, 0.01)
    specs = [HeadSpec(rate, 12, *r, seed) for rate, r, seed in product(rates, regularizers, range(3))]
    options = {
        "n_classes": n_classes, "batch_size": batch_size,
        "layout": FeatureLayout(("a", "b"), (41, n_features - 41)),
    }  # fmt: skip
    together = train_heads(features, labels, specs, **options)
    for n_heads in (1, 2, 7, 40):
        budget = n_heads * 3 * 4 * n_features * n_classes
        assert bitwise_equal(train_heads(features, labels, specs, memory_budget=budget, **options), together)
    assert bitwise_equal(train_heads(features, labels, specs, memory_budget=1, **options), together)
    for chosen in ([5], [44, 3], [9, 8, 7], list(range(1, 45, 2))):
        some = train_heads(features, labels, [specs[head] for head in chosen], **options)
        expected = HeadStack(together.weight[chosen], together.bias[chosen], together.train_loss[chosen])
        assert bitwise_equal(some, expected)


@pytest.mark.parametrize("n_classes", [2, 10])
def test_groups_of_heads_in_orders_of_their_own_change_no_bit(n_classes: int) -> None:
    generator = np.random.default_rng(0)
    groups = []
    for n_heads, n_kept in ((1, 3), (4, 7), (2, 700), (3, 47)):
        features = generator.normal(size=(n_heads, 150, n_kept)).astype(np.float32)
        labels = np.stack([generator.permutation(np.arange(150) % n_classes) for _ in range(n_heads)])
        groups.append((features, labels, [HeadSpec(0.1, 12, seed=seed) for seed in range(n_heads)]))
    stacks = train_groups(groups, n_classes=n_classes)
    for (features, labels, specs), stack in zip(groups, stacks, strict=True):
        for head, spec in enumerate(specs):
            one = slice(head, head + 1)
            (alone,) = train_groups([(features[one], labels[one], [spec])], n_classes=n_classes)
            assert bitwise_equal(alone, HeadStack(stack.weight[one], stack.bias[one], stack.train_loss[one]))
            shared = train_heads(features[head], labels[head], [spec], n_classes=n_classes)
            torch.testing.assert_close(shared.weight, stack.weight[one], atol=1e-4, rtol=0)
