"""Search spaces, and heads of many settings trained in one call."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from h2t import methods
from h2t.errors import UserError
from h2t.features import FeatureLayout, select, unit_norm
from h2t.head2toe import Head, fit, predict
from h2t.heads.spec import HeadSpec
from h2t.heads.training import train_heads
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS, find_method, search_space
from h2t.metrics import cross_entropy
from h2t.selection import keep_top, relevance_scores

GOLDENS = Path(__file__).parents[1] / "goldens"
ARRAYS = np.load(GOLDENS / "traj.npz")
NOTES = json.loads((GOLDENS / "traj.json").read_text())
GRID = {
    "target_sizes": [512, 8192],
    "learning_rates": [0.1, 0.01],
    "steps": [20, 30],
    "coefficients": [1e-3, 1e-5],
    "keep_fractions": [0.02, 0.1, 1.0],
}
LAYOUT = FeatureLayout(("early", "middle", "pre_logits"), (60, 100, 40))


def test_search_spaces_leave_out_what_a_method_does_not_use() -> None:
    sizes = {name: len(search_space(name, **GRID)) for name in ("linear", "all_l2", "all_l21", "head2toe")}
    assert sizes == {"linear": 4, "all_l2": 16, "all_l21": 16, "head2toe": 48}
    assert {point.target_size for point in search_space("linear", **GRID)} == {512}
    assert {point.keep_fraction for point in search_space("all_l1", **GRID)} == {1.0}
    assert len(set(search_space("head2toe", **GRID))) == 48


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
    start = {"initial_weight": ARRAYS["W0"], "initial_bias": ARRAYS["b0"]}
    scored = train_heads(unit_norm(ARRAYS["X"], layout), ARRAYS["y"], [scoring], n_classes=5, **start)
    kept = keep_top(relevance_scores(scored.weight[0]), notes["keep_fraction"])
    official = np.concatenate([ARRAYS[f"e2e_{case}/sfi_L{tap}"] + layout.offsets[tap] for tap in range(4)])
    order = np.argsort(official)  # the official code keeps a tap's features in the order of their scores
    np.testing.assert_array_equal(kept, official[order])

    first, last = (ARRAYS[f"e2e_{case}/{name}"][order] for name in ("W0_phase2", "W_phase2"))
    final = train_heads(select(ARRAYS["X"], layout, kept), ARRAYS["y"], [HeadSpec(rate, steps)], n_classes=5,
                        initial_weight=first, initial_bias=np.zeros(5, np.float32))  # fmt: skip
    np.testing.assert_allclose(final.weight[0], last, atol=1e-5, rtol=0)
    point = Hyperparameters("head2toe", 512, rate, steps, scoring.coefficient, notes["keep_fraction"])
    head = Head(point, 0, kept, layout, final.weight[0].numpy(), final.bias[0].numpy(), 0.0)
    logits = predict(head, ARRAYS["Xtest"])
    np.testing.assert_allclose(logits, ARRAYS[f"e2e_{case}/test_logits"], atol=3e-5, rtol=0)
    assert (logits.argmax(1) == ARRAYS["ytest"]).mean() == pytest.approx(notes["query_accuracy_true"])


def made() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 4, 150)
    features = generator.normal(size=(150, 200)) + generator.normal(size=(4, 200))[labels]
    features[:, 60:80] = 0
    return features.astype(np.float32), labels


def everything() -> list[Hyperparameters]:
    one_size = {**GRID, "target_sizes": [512]}
    names = ("linear", "all_l2", "all_l1", "all_l21", "head2toe")
    return [point for name in names for point in search_space(name, **one_size)]


def fitted(points: list[Hyperparameters], **options: object) -> dict[tuple[Hyperparameters, int], Head]:
    features, labels = made()
    features.flags.writeable = False
    heads = fit(features, labels, LAYOUT, points, n_classes=4, embedding="pre_logits", **options)  # type: ignore[arg-type]
    return {(head.settings, head.seed): head for head in heads}


def test_a_call_gives_every_setting_and_seed_once() -> None:
    points = everything()
    heads = fitted(points, seeds=(0, 5))
    assert set(heads) == {(point, seed) for point in points for seed in (0, 5)}
    features, labels = made()
    for (point, _), head in heads.items():
        expected = 40 if point.method == "linear" else int(200 * point.keep_fraction)
        assert head.weight.shape == (expected, 4)
        assert len(head.kept) == expected
        assert head.weight.flags.c_contiguous
        assert cross_entropy(predict(head, features), labels) == pytest.approx(head.train_loss, abs=1e-4)


@pytest.mark.parametrize(
    "point",
    [
        Hyperparameters("linear", 512, 0.1, 20),
        Hyperparameters("all_l21", 512, 0.01, 30, 1e-3),
        Hyperparameters("all_l1", 512, 0.01, 20, 1e-5),
        Hyperparameters("head2toe", 512, 0.01, 30, 1e-3, 0.1),
        Hyperparameters("head2toe", 512, 0.1, 20, 1e-5, 0.02),
        Hyperparameters("head2toe", 512, 0.01, 20, 1e-5, 1.0),
    ],
)
def test_a_head_does_not_depend_on_the_other_settings(point: Hyperparameters) -> None:
    together, alone = fitted(everything())[point, 0], fitted([point])[point, 0]
    np.testing.assert_array_equal(together.kept, alone.kept)
    np.testing.assert_allclose(together.weight, alone.weight, atol=1e-4, rtol=0)
    assert together.train_loss == pytest.approx(alone.train_loss, abs=1e-4)


@pytest.mark.parametrize("option", [{"memory_budget": 3 * 4 * 200 * 4 * 2}, {"memory_budget": 100}])
def test_a_memory_budget_does_not_change_the_heads(option: dict) -> None:
    whole, within = fitted(everything()), fitted(everything(), **option)
    for key, head in whole.items():
        np.testing.assert_array_equal(within[key].kept, head.kept)
        np.testing.assert_allclose(within[key].weight, head.weight, atol=1e-4, rtol=0)


def test_groups_of_final_heads_do_not_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    points = search_space("head2toe", **{**GRID, "target_sizes": [512]})
    whole = fitted(points)
    monkeypatch.setitem(methods.GROUP_BYTES, "cpu", 1)
    for key, head in fitted(points).items():
        np.testing.assert_allclose(whole[key].weight, head.weight, atol=1e-5, rtol=0)


def test_rows_choose_and_order_the_training_examples() -> None:
    features, labels = made()
    rows = np.random.default_rng(2).permutation(150)[:130]
    points = [
        Hyperparameters("all_l2", 512, 0.1, 20, 1e-3),
        Hyperparameters("head2toe", 512, 0.1, 20, 1e-3, 0.1),
    ]
    options = {"layout": LAYOUT, "settings": points, "n_classes": 4, "embedding": "pre_logits"}
    chosen = list(fit(features, labels, rows=rows, **options))  # type: ignore[arg-type]
    copied = list(fit(features[rows], labels[rows], **options))  # type: ignore[arg-type]
    for ours, theirs in zip(chosen, copied, strict=True):
        np.testing.assert_array_equal(ours.weight, theirs.weight)


def test_head2toe_keeps_what_the_shared_scoring_phase_ranks_highest() -> None:
    scoring, final = (
        Hyperparameters("all_l21", 512, 0.01, 30, 1e-3),
        Hyperparameters("head2toe", 512, 0.01, 30, 1e-3, 0.1),
    )
    heads = fitted([scoring, final])
    expected = keep_top(relevance_scores(heads[scoring, 0].weight), 0.1)
    np.testing.assert_array_equal(heads[final, 0].kept, expected)


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
def test_settings_that_cannot_be_fitted_are_refused(points: list[Hyperparameters], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fitted(points)


def test_an_unknown_embedding_is_refused() -> None:
    features, labels = made()
    point = replace(everything()[0], steps=2)
    with pytest.raises(UserError, match="unknown tap 'late'"):
        fit(features, labels, LAYOUT, [point], n_classes=4, embedding="late")


def test_titles_are_those_of_the_paper() -> None:
    assert [METHODS[name].title for name in ("linear", "all_l21", "head2toe_ft")] == [
        "Linear", "+All-l2,1", "Head2Toe-FT",
    ]  # fmt: skip
