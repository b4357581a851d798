"""What a run will take, against what a run took: counts are exact, times are a model."""

from pathlib import Path

import pytest
import yaml

from h2t.costs import head_flops
from h2t.hyperparameters import Hyperparameters
from pipelines.plan import (
    DEVICES,
    DRIVER_S,
    STAGE_S,
    Rates,
    StagePlan,
    bottleneck,
    calibrate,
    facts_of,
    feature_bytes,
    plan,
    seconds_on,
    total_seconds,
)
from pipelines.run_directory import RunDirectory
from tests.pipelines.conftest import frame, invoke, small_config

RATES = Rates(images=100.0, head_flops=1e9, final_flops=1e9, device="cpu")


def test_counts_are_those_of_the_run(finished: RunDirectory, images: Path) -> None:
    config = small_config(images)
    stages = {stage.stage: stage for stage in plan(facts_of(config), RATES)}
    assert list(stages) == ["extract", "sweep", "evaluate"]
    assert stages["extract"].work == "50 images"
    assert stages["sweep"].work == f"{len(frame(finished, 'trials'))} trials"
    n_heads = len(frame(finished, "results"))
    assert stages["evaluate"].work == f"{n_heads} heads, 21 test images"
    widths = {
        size: frame(finished, f"features/test_efficientnet/target-size-{size}").iloc[0] for size in (16, 64)
    }
    numbers = sum(len(value) for row in widths.values() for value in row if hasattr(value, "__len__") and not
                  isinstance(value, str))  # fmt: skip
    assert feature_bytes(config) == stages["extract"].bytes_written == 4 * 50 * numbers


def test_a_scoring_phase_counts_once_for_all_fractions(images: Path) -> None:
    facts = facts_of(small_config(images))
    task, layout = facts.tasks[0], facts.layouts[16]
    points = [Hyperparameters("head2toe", 16, 0.1, 5, 1e-5, fraction) for fraction in (0.05, 0.2)]
    n = layout.n_features
    batch = len(task.labels["train"])
    expected = sum(head_flops(width, 2, 5, batch) for width in (n, int(0.05 * n), int(0.2 * n)))
    assert facts.fitting(task, points) == expected


def test_trainings_of_the_backbone_are_counted(images: Path) -> None:
    finetune = {"learning_rate": [0.1, 0.01], "steps": [2, 4], "batch_size": 8, "folds": 2}
    config = small_config(images, methods=["linear", "scratch"], finetune=finetune)
    stage = plan(facts_of(config), RATES)[-1]
    assert stage.stage == "finetune"
    assert stage.work == f"{2 * (4 * 2 + 2)} trainings of the backbone"


def test_more_devices_take_no_longer_and_end_at_the_largest_unit(images: Path) -> None:
    stages = plan(facts_of(small_config(images)), RATES)
    totals = [total_seconds(stages, devices) for devices in DEVICES]
    assert totals == sorted(totals, reverse=True)
    assert bottleneck(stages, 1) in [stage.stage for stage in stages]
    extract = stages[0]
    assert extract.units == extract.pieces(1) < extract.finest == extract.pieces(512)
    assert seconds_on(extract, extract.finest) == seconds_on(extract, 10 * extract.finest)


def test_the_device_at_hand_is_measured(images: Path) -> None:
    rates = calibrate(facts_of(small_config(images)))
    assert rates.images > 1
    assert min(rates.head_flops, rates.final_flops) > 1e6


def test_the_command_shows_stages_and_devices(images: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_config(images).model_dump(mode="json")))
    code, shown = invoke("plan", str(recipe))
    assert code == 0
    for part in ("50 images", "88 trials", "512 devices", "measured now"):
        assert part in shown, part


@pytest.mark.parametrize("recipe", ["vtab1k-resnet50"])
def test_a_recipe_whose_images_are_not_there_says_so(recipe: str) -> None:
    from h2t.errors import UserError

    with pytest.raises(UserError, match="vtab-1k"):
        invoke("plan", recipe)


def test_the_driver_sets_an_end_to_what_more_devices_gain() -> None:
    stage = StagePlan("sweep", "trials", 1.0, 1.0, 10_000, 10_000 * 0.5 + STAGE_S)
    assert seconds_on(stage, 1) == pytest.approx(5000 + STAGE_S)
    assert seconds_on(stage, 512) == pytest.approx(10_000 * DRIVER_S["sweep"] + STAGE_S)
