"""What the studies compare, listed from facts of a task, without any training."""

from pathlib import Path

import pytest

from h2t.features import FeatureLayout
from h2t.hyperparameters import Hyperparameters
from pipelines.scope import EVERYTHING
from pipelines.studies import depth, find_study, study_names
from pipelines.studies.data_fraction import shots
from pipelines.studies.scaling import evenly_spaced
from pipelines.task_data import open_task
from pipelines.variants import Facts, RecipeStudy, Study
from tests.pipelines.conftest import small_config, write_task

TAPS = (*(f"tap{number}" for number in range(31)), "pre_logits")
ON_HEADS = [name for name in study_names() if isinstance(find_study(name), Study)]


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Facts:
    """Of made-up taps, which cost equally much."""
    monkeypatch.setattr(depth, "tap_depths", lambda backbone: {tap: n / 32 for n, tap in enumerate(TAPS, 1)})
    write_task(tmp_path, "first")
    task = open_task(small_config(tmp_path, tasks=["first"]), "first")
    layouts = {size: FeatureLayout(TAPS, (*(size for _ in TAPS[1:]), 60)) for size in (16, 64)}
    chosen = {
        name: {"head2toe": Hyperparameters("head2toe", size, 0.1, 5, 1e-5, 0.2)}
        for name, size in (("first", 64), ("second", 16))
    }
    return Facts(task, layouts, "pre_logits", chosen)


@pytest.mark.parametrize("name", ON_HEADS)
def test_variants_have_names_of_their_own_and_references_that_exist(facts: Facts, name: str) -> None:
    study = find_study(name)
    assert isinstance(study, Study)
    variants = study.variants(facts)
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names) > 1
    assert {variant.reference for variant in variants} - {""} <= set(names)
    assert all(variant.points for variant in variants)
    sizes = {point.target_size for variant in variants for point in variant.points}
    assert sizes <= set(facts.layouts)


def test_the_target_size_is_the_nearest_to_the_embedding(facts: Facts) -> None:
    assert facts.target_size == 64


def test_windows_begin_at_doubling_offsets_and_end_at_the_end(facts: Facts) -> None:
    study = find_study("relevance-offset")
    assert isinstance(study, Study)
    n_features = facts.layouts[64].n_features
    n_kept = n_features // 8
    offsets = [variant.points[0].offset for variant in study.variants(facts)]
    assert offsets == [0, n_kept, 2 * n_kept, 4 * n_kept, n_features - n_kept]
    assert {int(n_features * v.points[0].keep_fraction) for v in study.variants(facts)} == {n_kept}


def test_budgets_of_depth_take_the_first_taps(facts: Facts) -> None:
    found = depth.variants(facts)
    assert [variant.x for variant in found] == [0.25, 0.5, 0.75, 1.0]
    assert [variant.scope.taps for variant in found] == [TAPS[:8], TAPS[:16], TAPS[:24], None]


def test_features_of_another_task_come_with_its_target_size(facts: Facts) -> None:
    study = find_study("transfer-selection")
    assert isinstance(study, Study)
    own, other = study.variants(facts)
    assert own.scope == EVERYTHING
    assert other.scope.kept_on == "second"
    assert other.points[0].target_size == 16


@pytest.mark.parametrize(
    ("n", "fraction", "expected"), [(32, 1 / 16, (15, 31)), (5, 1 / 16, (4,)), (8, 0.25, (3, 7))]
)
def test_parts_of_the_taps_are_evenly_spaced_and_end_with_the_last(
    n: int, fraction: float, expected: tuple[int, ...]
) -> None:
    taps = tuple(map(str, range(n)))
    assert evenly_spaced(taps, fraction) == tuple(map(str, expected))
    assert evenly_spaced(taps, 1.0) == taps


@pytest.mark.parametrize(
    ("n_classes", "fraction", "expected"),
    [(10, 0.25, 25), (397, 0.5, 1), (397, 0.1, 1), (397, 1.0, None), (2, 0.75, 375)],
)
def test_shots_are_those_of_the_paper(n_classes: int, fraction: float, expected: int | None) -> None:
    assert shots(1000, n_classes, fraction) == expected


def test_smaller_parts_of_the_images_lie_in_larger_ones(facts: Facts) -> None:
    task = facts.task
    parts = [set(task.subset("train", n).tolist()) for n in (1, 3, 5)]
    assert parts[0] < parts[1] < parts[2]
    assert [len(part) for part in parts] == [2, 6, 10]
    labels = task.labels["train"][sorted(parts[1])]
    assert (labels == 0).sum() == (labels == 1).sum() == 3
    for shots_of in (1, 3):
        for fold in range(task.n_folds(shots_of)):
            train, validation = task.fold(fold, shots_of)
            assert set(train) | set(validation) == set(task.subset("train", shots_of))
            assert not set(train) & set(validation)


@pytest.mark.parametrize(
    ("backbone", "study", "expected"),
    [
        ({"name": "test_efficientnet"}, "activations", {"with_input", "pre_normalization", "pre_activation"}),
        ({"name": "test_convnext"}, "activations", {"with_input"}),
        ({"name": "test_vit"}, "class-token", {"only_cls", "nopool_cls"}),
        ({"name": "test_vit", "tokens": "grid"}, "class-token", {"only_cls"}),
        ({"name": "test_efficientnet"}, "class-token", set()),
    ],
)
def test_other_features_are_those_that_the_backbone_has(
    tmp_path: Path, backbone: dict[str, str], study: str, expected: set[str]
) -> None:
    size = 160 if backbone["name"] == "test_vit" else 64
    section = {**backbone, "image_size": size}
    config = small_config(tmp_path, tasks=["first"], backbone=section, methods=["head2toe"])
    found = find_study(study)
    assert isinstance(found, RecipeStudy)
    assert set(found.backbones(config)) == expected
