"""The head trainer against the official code's trajectories, and what must hold for any data."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from h2t.errors import UserError
from h2t.features import FeatureLayout, unit_norm
from h2t.heads import blocks as head_groups
from h2t.heads import trainer as head_trainer
from h2t.heads.blocks import Group
from h2t.heads.spec import HeadSpec, Precision
from h2t.heads.trainer import Batches, HeadTrainer
from h2t.heads.training import train_groups, train_heads, train_stacks
from h2t.selection import keep_top, relevance_scores

GOLDENS = Path(__file__).parents[2] / "goldens"
ARRAYS = np.load(GOLDENS / "traj.npz")
NOTES = json.loads((GOLDENS / "traj.json").read_text())
REGULARIZERS = {"l1_regularizer": "l1", "l2_regularizer": "l2", "group_lrp_regularizer_coef": "l21"}
# Largest difference of a weight after all 200 steps, where it may be larger than early on: rounding decides
# the sign of a weight near zero under l1, and which rows a group lasso at a high rate pushes to zero.
FINAL = {"l1_1e-3_lr0.01": 2e-3, "gl_1e-3_lr0.01": 3.4e-5, "gl_1e-3_lr0.1": 4e-3}


def golden_spec(case: str) -> HeadSpec:
    overrides = NOTES["cases"][case]["overrides"]
    found = [(REGULARIZERS[key], value) for key, value in overrides.items() if key in REGULARIZERS]
    return HeadSpec(overrides["learning_rate"], NOTES["cosine_horizon_T"], *(found or [(None, 0.0)])[0])


def golden_features(case: str) -> np.ndarray:
    features, widths = ARRAYS["X"], tuple(NOTES["layer_sizes"])
    if case.startswith("perfeature"):
        return (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-5)
    return unit_norm(features, FeatureLayout(tuple(map(str, widths)), widths))


@pytest.mark.parametrize("case", NOTES["cases"])
def test_follows_the_official_trajectory(case: str) -> None:
    rows, labels = torch.from_numpy(golden_features(case)), torch.from_numpy(ARRAYS["y"].astype(np.int64))
    batches = Batches(labels, NOTES["classes"], NOTES["batch"])
    start = torch.from_numpy(ARRAYS["W0"])[None], torch.from_numpy(ARRAYS["b0"])[None]
    spec = golden_spec(case)
    trainer = HeadTrainer(batches, [Group(rows, [spec], *start)])
    early = 1e-5 if spec.learning_rate == 0.1 else 2e-6
    tolerance = {1: early, 10: early, 200: FINAL.get(case, 6e-6)}
    for step in range(spec.steps):
        trainer.step(step)
        if step + 1 in tolerance:
            expected = ARRAYS[f"{case}/W_{step + 1}"]
            np.testing.assert_allclose(trainer.weight()[0][0], expected, atol=tolerance[step + 1], rtol=0)


@pytest.mark.parametrize("case", NOTES["cases"])
@pytest.mark.parametrize("fraction", ["0.01", "0.05", "0.2"])
def test_selects_what_the_official_code_selects(case: str, fraction: str) -> None:
    trained = train_heads(
        golden_features(case), ARRAYS["y"], [golden_spec(case)], n_classes=5, initial_weight=ARRAYS["W0"],
        initial_bias=ARRAYS["b0"],
    )  # fmt: skip
    kept = keep_top(relevance_scores(trained.weight[0]), float(fraction))
    official = ARRAYS[f"{case}/kept_connectivity_l2_F{fraction}"]
    overlap = NOTES["cases"][case]["overlap"][f"F{fraction}"]
    assert len(np.intersect1d(kept, official)) >= int(overlap * len(official))
    assert len(kept) == len(official)


def made(
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
]


def test_a_stack_equals_single_runs() -> None:
    features, labels = made()
    stack = train_heads(features, labels, MIXED, n_classes=4)
    for head, spec in enumerate(MIXED):
        alone = train_heads(features, labels, [spec], n_classes=4)
        torch.testing.assert_close(stack.weight[head], alone.weight[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(stack.bias[head], alone.bias[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(stack.train_loss[head], alone.train_loss[0], atol=1e-5, rtol=0)


def test_the_same_call_gives_the_same_bits() -> None:
    features, labels = made()
    first, second = (train_heads(features, labels, MIXED, n_classes=4).weight for _ in range(2))
    assert torch.equal(first, second)


def test_one_matrix_per_head_equals_single_runs() -> None:
    pairs = [made(seed=seed) for seed in range(3)]
    labels = pairs[0][1]
    features = np.stack([features for features, _ in pairs])
    specs = [HeadSpec(0.1, 20), HeadSpec(0.01, 20, "l21", 1e-2), HeadSpec(0.1, 25, "l1", 1e-3)]
    stack = train_heads(features, labels, specs, n_classes=4)
    for head, spec in enumerate(specs):
        alone = train_heads(features[head], labels, [spec], n_classes=4)
        torch.testing.assert_close(stack.weight[head], alone.weight[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups_side_by_side_equal_their_single_runs(dtype: Precision) -> None:
    labels = made()[1]
    groups = [
        (made(n_features=90)[0], [HeadSpec(0.01, 20, "l1", 1e-3), HeadSpec(0.1, 20, "l21", 1e-2)]),
        (np.stack([made(n_features=7, seed=seed)[0] for seed in range(3)]), [HeadSpec(0.1, 20)] * 3),
        (made(n_features=300)[0], [HeadSpec(0.1, 20, "l2", 1e-3)]),
    ]
    stacks = train_groups(groups, labels, n_classes=4, dtype=dtype)
    for (features, specs), stack in zip(groups, stacks, strict=True):
        alone = train_heads(features, labels, specs, n_classes=4, dtype=dtype)
        torch.testing.assert_close(stack.weight, alone.weight, atol=2e-5, rtol=0)
        torch.testing.assert_close(stack.bias, alone.bias, atol=2e-5, rtol=0)
        torch.testing.assert_close(stack.train_loss, alone.train_loss, atol=1e-5, rtol=0)


def test_groups_of_different_steps_are_refused() -> None:
    features, labels = made()
    with pytest.raises(UserError, match="equal steps, got 5, 6"):
        train_groups([(features, [HeadSpec(0.1, 6)]), (features, [HeadSpec(0.1, 5)])], labels, n_classes=4)


@pytest.mark.parametrize("block_bytes", [4 * 28 * 128, 4 * 28 * 320])
def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    features, labels = made(n_features=700)
    features = unit_norm(features, FeatureLayout(("a", "b", "c"), (100, 33, 567)))
    whole = train_heads(features, labels, MIXED, n_classes=4)
    monkeypatch.setitem(head_trainer.BLOCK_BYTES, "cpu", block_bytes)
    blocked = train_heads(features, labels, MIXED, n_classes=4)
    torch.testing.assert_close(blocked.weight, whole.weight, atol=2e-5, rtol=0)


@pytest.mark.parametrize("heads_within", [2, 1, 0])
def test_a_memory_budget_does_not_change_the_result(heads_within: int) -> None:
    features, labels = made(n_features=700)
    whole = train_heads(features, labels, MIXED, n_classes=4)
    budget = heads_within * 3 * 4 * 700 * 4 or 1000
    within = list(train_stacks(features, labels, MIXED, n_classes=4, memory_budget=budget))
    assert max(len(heads) for heads, _ in within) == max(heads_within, 1)
    for heads, stack in within:
        torch.testing.assert_close(stack.weight, whole.weight[heads], atol=2e-5, rtol=0)


def test_permuting_features_permutes_scores() -> None:
    features, labels = made()
    order = np.random.default_rng(5).permutation(features.shape[1])
    start = head_groups.initial_weights(0, features.shape[1], 4)
    spec = HeadSpec(0.01, 40, "l21", 1e-4)
    plain = train_heads(features, labels, [spec], n_classes=4, initial_weight=start)
    moved = train_heads(features[:, order], labels, [spec], n_classes=4, initial_weight=start[order])
    expected = relevance_scores(plain.weight[0])[order]
    np.testing.assert_allclose(relevance_scores(moved.weight[0]), expected, rtol=1e-3, atol=1e-6)


def test_rows_of_zero_weights_stay_finite() -> None:
    features, labels = made()
    features[:, :10] = 0
    specs = [replace(spec, coefficient=1e-2) for spec in MIXED]
    stack = train_heads(features, labels, specs, n_classes=4, initial_weight=np.zeros((90, 4), np.float32))
    assert torch.isfinite(stack.weight).all()
    assert (stack.weight[:, :10] == 0).all()


def test_fewer_rows_than_a_batch_and_an_absent_class() -> None:
    features, labels = made(n=40, n_classes=3)
    stack = train_heads(features, labels, [HeadSpec(0.1, 60, "l2", 1e-4)], n_classes=6)
    logits = features @ stack.weight[0].numpy() + stack.bias[0].numpy()
    assert (logits.argmax(1) == labels).mean() > 0.9
    assert (stack.bias[0, 3:] < stack.bias[0, :3].min()).all()


def test_train_loss_is_the_mean_cross_entropy() -> None:
    features, labels = made()
    stack = train_heads(features, labels, [HeadSpec(0.1, 15)], n_classes=4)
    logits = torch.from_numpy(features) @ stack.weight[0] + stack.bias[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    torch.testing.assert_close(stack.train_loss[0], expected, atol=1e-5, rtol=0)


def test_features_are_read_only_and_unchanged() -> None:
    features, labels = made()
    before = features.copy()
    features.flags.writeable = False
    train_heads(features, labels, MIXED, n_classes=4)
    np.testing.assert_array_equal(features, before)


def test_seeds_draw_different_starts_within_the_glorot_limit() -> None:
    first, second = (head_groups.initial_weights(seed, 600, 4) for seed in (0, 1))
    limit = np.sqrt(6 / 604)
    assert not np.allclose(first, second)
    assert np.abs(first).max() <= limit
    assert first.std() == pytest.approx(limit / np.sqrt(3), rel=0.05)


def test_bfloat16_products_reach_nearly_the_same_loss() -> None:
    features, labels = made()
    spec = HeadSpec(0.01, 60, "l21", 1e-4)
    full = train_heads(features, labels, [spec], n_classes=4)
    half = train_heads(features, labels, [spec], n_classes=4, dtype="bfloat16")
    assert not torch.equal(full.weight, half.weight)
    torch.testing.assert_close(half.train_loss, full.train_loss, rtol=0.02, atol=0)


def test_tf32_is_allowed_during_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = HeadTrainer.step

    def watched(trainer: HeadTrainer, number: int) -> None:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        step(trainer, number)

    monkeypatch.setattr(HeadTrainer, "step", watched)
    features, labels = made()
    train_heads(features, labels, [HeadSpec(0.1, 1)], n_classes=4, dtype="tf32")
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
        ({"specs": [HeadSpec(0.1, 5, "l3")]}, "unknown regularizer 'l3'"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_used_is_refused(change: dict, message: str) -> None:
    features, labels = made()
    arguments = {"features": features, "labels": labels, "specs": MIXED, "n_classes": 4} | change
    with pytest.raises(UserError, match=message):
        train_heads(**arguments)


def test_infinity_is_named_by_its_row() -> None:
    features, labels = made()
    features[5, 3] = np.inf
    with pytest.raises(UserError, match="row 5"):
        train_heads(features, labels, MIXED, n_classes=4)
