"""Search spaces, heads of many points trained in one call, and the prediction of many heads at once."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from h2t import head2toe
from h2t.errors import UserError
from h2t.features import FeatureLayout, keep_features, unit_norm
from h2t.head2toe import Head, HeadBank, columns_of, fit, logits
from h2t.heads.blocks import HeadGroup, HeadStack
from h2t.heads.solvers import SOLVERS
from h2t.heads.spec import HeadSpec
from h2t.heads.trainer import Batches, HeadTrainer
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS, Method, find_method, search_space
from h2t.metrics import cross_entropy
from h2t.selection import DATA_RULES, WEIGHT_RULES, keep_top, relevance_scores

GOLDENS = Path(__file__).parents[1] / "goldens"
ARRAYS = np.load(GOLDENS / "traj.npz")
NOTES = json.loads((GOLDENS / "traj.json").read_text())
FROZEN = [name for name, method in METHODS.items() if not method.trains_backbone]


@dataclass(frozen=True)
class Values:
    target_size: list[int] = field(default_factory=lambda: [512, 8192])
    learning_rate: list[float] = field(default_factory=lambda: [0.1, 0.01])
    steps: list[int] = field(default_factory=lambda: [20, 30])
    coefficient: list[float] = field(default_factory=lambda: [1e-3, 1e-4, 1e-5])
    head2toe_coefficient: list[float] = field(default_factory=lambda: [1e-3, 1e-5])
    layergroup_coefficient: list[float] = field(default_factory=lambda: [1.0, 1e-3])
    keep_fraction: list[float] = field(default_factory=lambda: [0.02, 0.1, 1.0])


GRID, ONE_SIZE = Values(), Values(target_size=[512])
LAYOUT = FeatureLayout(("early", "middle", "pre_logits"), (60, 100, 40))


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_search_spaces_leave_out_what_a_method_does_not_use(method: Method) -> None:
    points = search_space(method.name, GRID)
    assert len(set(points)) == len(points)
    axes = {
        axis: {getattr(point, axis) for point in points} for axis in vars(GRID) if axis in vars(points[0])
    }
    assert axes["target_size"] == ({512} if method.features == "embedding" else {512, 8192})
    trained = set(getattr(GRID, method.coefficients)) if method.regularizer else {0.0}
    assert axes["coefficient"] == (set(method.solver_coefficients) if method.solver else trained)
    assert (axes["steps"] == {0}) == (axes["learning_rate"] == {0.0}) == bool(method.solver)
    assert axes["keep_fraction"] == (set(GRID.keep_fraction) if method.features == "kept" else {1.0})
    assert len(points) == math.prod(len(values) for values in axes.values())


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_methods_are_consistent(method: Method) -> None:
    rules = WEIGHT_RULES if method.scored else DATA_RULES
    assert (method.features == "kept") == (method.selection in rules)
    assert method.solver is None or (method.solver in SOLVERS and not method.trains_backbone)
    assert method.scored or method.features == "kept"
    others = {*method.best_of, *([method.builds_on] if method.builds_on else [])}
    assert others <= METHODS.keys() - {method.name}
    assert method.trains_backbone or not others


def test_methods_and_search_spaces_need_no_torch() -> None:
    """So that the command line answers at once."""
    modules = "h2t.methods, h2t.hyperparameters, h2t.heads.spec, h2t.folds"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean head2toe"):
        find_method("head2toes")


@pytest.mark.parametrize("case", NOTES["e2e"])
def test_two_phases_end_where_the_official_code_ends(case: str) -> None:
    """Scores on all features, selection, unit norm over the kept, final head: its weights and test logits."""
    notes = NOTES["e2e"][case]
    layout = FeatureLayout(("0", "1", "2", "3"), tuple(NOTES["layer_sizes"]))
    rate, steps = notes["learning_rate"], notes["training_steps"]
    scoring = HeadSpec(rate, steps, "l21", notes["ow_group_lrp_regularizer_coef"])
    scored = golden_head(unit_norm(ARRAYS["X"], layout), scoring, ARRAYS["W0"])
    kept = keep_top(relevance_scores(scored.weight[0]), notes["keep_fraction"])
    official = np.concatenate([ARRAYS[f"e2e_{case}/sfi_L{tap}"] + layout.offsets[tap] for tap in range(4)])
    order = np.argsort(official)  # the official code keeps a tap's features in the order of their scores
    np.testing.assert_array_equal(kept, official[order])

    first, last = (ARRAYS[f"e2e_{case}/{name}"][order] for name in ("W0_phase2", "W_phase2"))
    final = golden_head(keep_features(ARRAYS["X"], layout, kept), HeadSpec(rate, steps), first)
    np.testing.assert_allclose(final.weight[0], last, atol=1e-5, rtol=0)
    point = Hyperparameters("head2toe", 512, rate, steps, scoring.coefficient, notes["keep_fraction"])
    head = Head(point, 0, kept, layout, final.weight[0].numpy(), final.bias[0].numpy(), 0.0)
    predicted = logits(head, ARRAYS["Xtest"])
    np.testing.assert_allclose(predicted, ARRAYS[f"e2e_{case}/test_logits"], atol=3e-5, rtol=0)
    assert (predicted.argmax(1) == ARRAYS["ytest"]).mean() == pytest.approx(notes["query_accuracy_true"])


def golden_head(features: np.ndarray, spec: HeadSpec, start: np.ndarray) -> HeadStack:
    """A head trained from given weights; all official biases start at zero."""
    labels = torch.from_numpy(ARRAYS["y"].astype(np.int64))
    group = HeadGroup(torch.from_numpy(np.array(features)), [spec], weight=torch.from_numpy(start)[None])
    return HeadTrainer(Batches(labels, NOTES["classes"], NOTES["batch"]), [group]).train()[0]


def example() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 4, 150)
    features = generator.normal(size=(150, 200)) + generator.normal(size=(4, 200))[labels]
    features[:, 60:80] = 0
    return features.astype(np.float32), labels


def everything() -> list[Hyperparameters]:
    return [point for name in FROZEN for point in search_space(name, ONE_SIZE)]


def fitted(points: list[Hyperparameters], **options: object) -> dict[tuple[Hyperparameters, int], Head]:
    features, labels = example()
    features.flags.writeable = False
    heads = fit(features, labels, LAYOUT, points, n_classes=4, embedding="pre_logits", **options)  # type: ignore[arg-type]
    return {(head.hyperparameters, head.seed): head for head in heads}


def test_a_call_gives_every_point_and_seed_once() -> None:
    points = everything()
    heads = fitted(points, seeds=(0, 5))
    assert set(heads) == {(point, seed) for point in points for seed in (0, 5)}
    features, labels = example()
    for (point, _), head in heads.items():
        on_embedding = METHODS[point.method].features == "embedding"
        expected = 40 if on_embedding else int(200 * point.keep_fraction)
        assert head.weight.shape == (expected, 150 if head.neighbours else 4)
        assert head.n_classes == 4
        assert len(head.kept) == expected
        assert head.weight.flags.c_contiguous
        assert cross_entropy(logits(head, features), labels) == pytest.approx(head.train_loss, abs=1e-4)


@pytest.mark.parametrize(
    "point",
    [
        Hyperparameters("linear", 512, 0.1, 20),
        Hyperparameters("all_l21", 512, 0.01, 30, 1e-3),
        Hyperparameters("all_l1", 512, 0.01, 20, 1e-5),
        Hyperparameters("head2toe", 512, 0.01, 30, 1e-3, 0.1),
        Hyperparameters("head2toe", 512, 0.1, 20, 1e-5, 0.02),
        Hyperparameters("head2toe", 512, 0.01, 20, 1e-5, 1.0),
        Hyperparameters("head2toe_layergroup", 512, 0.01, 20, 1e-3, 0.1),
        Hyperparameters("random_features", 512, 0.1, 30, 0.0, 0.1),
    ],
)
def test_a_head_does_not_depend_on_the_other_points(point: Hyperparameters) -> None:
    together, alone = fitted(everything())[point, 0], fitted([point])[point, 0]
    np.testing.assert_array_equal(together.kept, alone.kept)
    np.testing.assert_allclose(together.weight, alone.weight, atol=1e-4, rtol=0)
    assert together.train_loss == pytest.approx(alone.train_loss, abs=1e-4)


@pytest.mark.parametrize("option", [{"memory_budget": 3 * 4 * 200 * 4 * 2}, {"memory_budget": 100}])
def test_a_memory_budget_does_not_change_the_heads(option: dict) -> None:
    unbounded, within = fitted(everything()), fitted(everything(), **option)
    for key, head in unbounded.items():
        np.testing.assert_array_equal(within[key].kept, head.kept)
        np.testing.assert_allclose(within[key].weight, head.weight, atol=1e-4, rtol=0)


def test_groups_of_final_heads_do_not_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    points = search_space("head2toe", ONE_SIZE)
    together = fitted(points)
    monkeypatch.setitem(head2toe.GROUP_BYTES, "cpu", 1)
    for key, head in fitted(points).items():
        np.testing.assert_allclose(together[key].weight, head.weight, atol=1e-5, rtol=0)


def test_rows_choose_and_order_the_training_examples() -> None:
    features, labels = example()
    rows = np.random.default_rng(2).permutation(150)[:130]
    points = [
        Hyperparameters("all_l2", 512, 0.1, 20, 1e-3),
        Hyperparameters("head2toe", 512, 0.1, 20, 1e-3, 0.1),
    ]
    options = {"layout": LAYOUT, "hyperparameters": points, "n_classes": 4, "embedding": "pre_logits"}
    chosen = list(fit(features, labels, rows=rows, **options))  # type: ignore[arg-type]
    copied = list(fit(features[rows], labels[rows], **options))  # type: ignore[arg-type]
    for ours, theirs in zip(chosen, copied, strict=True):
        np.testing.assert_array_equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("method", ["linear", "all_ridge", "head2toe", "head2toe_per_feature"])
def test_features_of_half_precision_give_the_heads_of_the_same_numbers(method: str) -> None:
    features, labels = example()
    halves = features.astype(np.float16)
    points = search_space(method, ONE_SIZE)
    options = {"layout": LAYOUT, "hyperparameters": points, "n_classes": 4, "embedding": "pre_logits"}
    rows = np.random.default_rng(2).permutation(len(labels))[:130]
    stored = list(fit(halves, labels, rows=rows, **options))  # type: ignore[arg-type]
    widened = list(fit(halves.astype(np.float32), labels, rows=rows, **options))  # type: ignore[arg-type]
    for ours, theirs in zip(stored, widened, strict=True):
        np.testing.assert_array_equal(ours.kept, theirs.kept)
        np.testing.assert_array_equal(ours.weight, theirs.weight)
        np.testing.assert_allclose(
            logits(ours, halves), logits(theirs, halves.astype(np.float32)), atol=1e-5, rtol=0
        )


SHARING = [name for name in FROZEN if METHODS[name].regularizer == "l21"]


@pytest.mark.parametrize("method", [name for name in SHARING if METHODS[name].normalization == "unit"])
def test_features_are_kept_by_the_shared_scoring_phase(method: str) -> None:
    scoring = Hyperparameters("all_l21", 512, 0.01, 30, 1e-3)
    final = Hyperparameters(method, 512, 0.01, 30, 1e-3, 0.1)
    heads = fitted([scoring, final])
    rule, scores = METHODS[method].selection, heads[scoring, 0].weight
    expected = keep_top(WEIGHT_RULES[rule](scores, LAYOUT), 0.1) if rule else np.arange(200)
    np.testing.assert_array_equal(heads[final, 0].kept, expected)


def test_the_group_penalty_leaves_the_tap_with_the_signal() -> None:
    """A penalty on all weights together would leave the largest norm in the widest tap here."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 4, 150)
    signal = generator.normal(size=(4, 200)) * np.repeat([0.2, 0.3, 1.0], LAYOUT.widths)
    noise = generator.normal(size=(150, 200))
    features = (noise + signal[labels]).astype(np.float32)
    point = Hyperparameters("head2toe_layergroup", 512, 0.01, 30, 0.1, 0.2)
    (head,) = fit(features, labels, LAYOUT, [point], n_classes=4, embedding="pre_logits")
    np.testing.assert_array_equal(head.kept, np.arange(160, 200))


def test_random_features_need_no_scoring_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(head2toe, "train_stacks")
    points = search_space("random_features", ONE_SIZE)
    heads = fitted(points, seeds=(0, 1))
    assert len(heads) == 2 * len(points)
    first, second = (heads[points[0], seed].kept for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([Hyperparameters("finetune", 512, 0.1, 5)], "finetune trains the backbone"),
        (
            [Hyperparameters("linear", 512, 0.1, 5), Hyperparameters("linear", 1024, 0.1, 5)],
            "one target size",
        ),
        ([Hyperparameters("head2toe", 512, 0.1, 5, 1e-3, 0.001)], "keeps none of 200 features"),
        ([Hyperparameters("lineal", 512, 0.1, 5)], "unknown method 'lineal'"),
    ],
)
def test_points_that_cannot_be_fitted_are_refused(points: list[Hyperparameters], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fitted(points)


def test_an_unknown_embedding_is_refused() -> None:
    features, labels = example()
    point = replace(everything()[0], steps=2)
    with pytest.raises(UserError, match="unknown tap 'late'"):
        fit(features, labels, LAYOUT, [point], n_classes=4, embedding="late")


WIDER = FeatureLayout(LAYOUT.taps, tuple(2 * width for width in LAYOUT.widths))


def random_head(kept: list[int], seed: int, layout: FeatureLayout, target_size: int) -> Head:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((len(kept), 3), np.float32)
    bias = generator.standard_normal(3).astype(np.float32)
    point = Hyperparameters("head2toe", target_size, 0.1, 5)
    return Head(point, seed, np.array(kept, np.int64), layout, weight, bias, 0.0)


def test_a_bank_predicts_what_its_heads_predict_alone() -> None:
    heads = [
        random_head(list(range(200)), 0, LAYOUT, 8),
        random_head([1, 2, 65, 190], 1, LAYOUT, 8),
        random_head(list(range(200)), 2, LAYOUT, 8),
        random_head([0, 399], 3, WIDER, 16),
        random_head([1, 2, 65, 190], 4, LAYOUT, 8),
    ]
    generator = np.random.default_rng(9)
    features = {size: generator.standard_normal((6, n), np.float32) for size, n in ((8, 200), (16, 400))}
    features[8][0] = 0
    bank = HeadBank(heads)
    predicted = bank.logits({size: torch.from_numpy(values) for size, values in features.items()})
    expected = [logits(head, features[head.hyperparameters.target_size]) for head in heads]
    assert len(bank.groups) == 3
    assert bank.target_sizes == [8, 16]
    np.testing.assert_allclose(predicted, np.stack(expected), atol=1e-5)


@pytest.mark.parametrize("method", ["head2toe", "head2toe_per_feature", "head2toe_unnormalised"])
@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_a_bank_normalises_as_its_heads_do(method: str, fraction: float) -> None:
    features, labels = example()
    point = Hyperparameters(method, 512, 0.01, 20, 1e-3, fraction)
    (head,) = fit(features, labels, LAYOUT, [point], n_classes=4, embedding="pre_logits")
    predicted = HeadBank([head]).logits({512: torch.from_numpy(features)})[0]
    np.testing.assert_allclose(predicted, logits(head, features), atol=1e-3)


def test_normalising_each_feature_makes_their_scale_and_mean_irrelevant() -> None:
    features, labels = example()
    point = Hyperparameters("head2toe_per_feature", 512, 0.01, 20, 1e-3, 0.2)
    moved = features * 8 + 2
    heads = [
        next(fit(values, labels, LAYOUT, [point], n_classes=4, embedding="pre_logits"))
        for values in (features, moved)
    ]
    np.testing.assert_array_equal(heads[0].kept, heads[1].kept)
    np.testing.assert_allclose(logits(heads[0], features), logits(heads[1], moved), atol=0.05)


def test_training_on_some_taps_is_training_on_their_columns() -> None:
    features, labels = example()
    point = Hyperparameters("head2toe", 512, 0.01, 20, 1e-3, 0.2)
    options = {"n_classes": 4, "embedding": "pre_logits"}
    first, _, last = LAYOUT.taps
    (head,) = fit(features, labels, LAYOUT, [point], taps=[last, first], **options)  # type: ignore[arg-type]
    columns = columns_of(LAYOUT, [first, last])
    part = FeatureLayout((first, last), (LAYOUT.widths[0], LAYOUT.widths[2]))
    (alone,) = fit(features[:, columns], labels, part, [point], **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(head.kept, columns[alone.kept])
    np.testing.assert_array_equal(head.weight, alone.weight)
    np.testing.assert_array_equal(logits(head, features), logits(alone, features[:, columns]))
    with pytest.raises(UserError, match="unknown tap 'stem'"):
        fit(features, labels, LAYOUT, [point], taps=["stem"], **options)  # type: ignore[arg-type]


def test_heads_on_given_features_are_those_whose_rule_keeps_them() -> None:
    point = Hyperparameters("head2toe", 512, 0.01, 20, 1e-3, 0.1)
    own = fitted([point], seeds=(0, 3))
    kept = {seed: own[point, seed].kept for seed in (0, 3)}
    for (_, seed), head in fitted([point], kept=kept).items():
        np.testing.assert_array_equal(head.weight, own[point, seed].weight)
    swapped = fitted([point], kept={0: kept[3]})
    np.testing.assert_array_equal(swapped[point, 0].kept, kept[3])


def test_an_offset_takes_the_features_behind_the_best() -> None:
    first = Hyperparameters("head2toe", 512, 0.01, 20, 1e-3, 0.1)
    heads = fitted([first, replace(first, offset=20), replace(first, keep_fraction=0.2)])
    best, behind, both = (head.kept for head in heads.values())
    np.testing.assert_array_equal(np.union1d(best, behind), both)
    assert not len(np.intersect1d(best, behind))
    with pytest.raises(UserError, match="reach beyond the 200 features"):
        fitted([replace(first, offset=181)])
