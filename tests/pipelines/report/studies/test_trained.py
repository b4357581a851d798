"""The sections of studies that needed training, on made-up rows."""

import math

import numpy as np
import pandas as pd
import pytest

from pipelines.report.figures import ReportFigure
from pipelines.report.frames import Frames
from pipelines.report.studies import Section, sections
from pipelines.report.studies.single_tap import ALONE, oracle, tap_correlations
from pipelines.report.trained import BETTER, WORSE, over_tasks, variant_rows, variant_table
from pipelines.studies import find_study, study_names
from pipelines.variants import Study
from tests.pipelines.report.conftest import frames_of, predictions_of, result_frame, study_frame

ON_HEADS = [name for name in study_names() if isinstance(find_study(name), Study)]


def shown(frames: Frames, name: str) -> Section | None:
    return next((section for section in sections(frames) if section.name == name), None)


@pytest.mark.parametrize("name", ON_HEADS)
def test_every_study_has_a_section_with_table_figure_and_words(name: str) -> None:
    assert shown(Frames(), name) is None
    section = shown(Frames(study_results=study_frame([name])), name)
    assert section is not None
    assert section.words.endswith(".")
    assert all(isinstance(figure, ReportFigure) and len(figure.data) for figure in section.figures)
    assert section.figures
    assert any(table.name == name for table in section.tables)


@pytest.mark.parametrize("name", ON_HEADS)
def test_two_backbones_and_a_task_less_in_one_of_them(name: str) -> None:
    rows = study_frame([name])
    other = rows[rows["task"] == "mnist"].assign(backbone="resnet50")
    section = shown(Frames(study_results=pd.concat([rows, other])), name)
    assert section is not None
    assert len({figure.name for figure in section.figures}) == len(section.figures)


def test_accuracy_is_the_median_over_seeds_and_means_need_every_task() -> None:
    rows = study_frame(["scaling"])
    first = (rows["task"] == "mnist") & (rows["x"] == 512) & (rows["series"] == "1")
    rows.loc[first, "test_accuracy"] = [0.5, 0.7]
    data = variant_rows(Frames(study_results=rows), "scaling")
    cell = data.query("task == 'mnist' and x == 512 and series == '1'")
    assert cell["accuracy"].item() == pytest.approx(0.6)
    assert cell["n_seeds"].item() == 2
    without = data[~((data["task"] == "mnist") & (data["x"] == 8192))]
    assert set(over_tasks(without)["x"]) == {512}


def test_marks_say_what_exceeds_chance() -> None:
    rows = study_frame(["normalisation"], tasks=["mnist"])
    for variant, low, high in (("head2toe_per_feature", 0.01, 0.03), ("head2toe_unnormalised", -0.03, -0.01)):
        rows.loc[rows["variant"] == variant, ["difference_low", "difference_high"]] = low, high
    table = variant_table("t", "T", "Note.", variant_rows(Frames(study_results=rows), "normalisation"))
    marks = [cell[-1] for cell in table.display["MNIST"]]
    assert marks[1:] == [BETTER, WORSE]
    assert marks[0].isdigit()


def test_the_oracle_is_the_best_tap_on_the_test_images() -> None:
    rows = study_frame(["single-tap"], tasks=["mnist"])
    rows["test_accuracy"] = rows["x"].map({-1: 0.5, 0: 0.4, 1: 0.45, 2: 0.9, 3: 0.6, 4: 0.7, 5: 0.1})
    best = oracle(variant_rows(Frames(study_results=rows), "single-tap")).iloc[0]
    assert best["tap"] == "blocks.2"
    assert best["gain"] == pytest.approx(0.4)


def test_a_tap_that_gains_on_far_tasks_has_a_negative_correlation() -> None:
    tasks = ["mnist", "solar_cells", "dsprites_loc", "dsprites_ori"]
    rows = study_frame(["single-tap"], tasks=tasks)
    rows["test_accuracy"] = 0.5
    affinity = pd.DataFrame(
        {"backbone": "efficientnet_lite0", "task": tasks, "affinity": [0.4, 0.3, 0.2, 0.1]}
    )
    for task, gain in zip(tasks, (0.0, 0.1, 0.2, 0.3), strict=True):
        rows.loc[(rows["task"] == task) & (rows["variant"] == "blocks.1"), "test_accuracy"] = 0.5 + gain
    ranks = tap_correlations(variant_rows(Frames(study_results=rows), "single-tap"), affinity)
    assert ranks.set_index("tap")["correlation"].to_dict() == {"blocks.1": pytest.approx(-1.0)}
    assert ALONE not in set(ranks["tap"])


def test_other_features_are_compared_on_the_same_test_images() -> None:
    results = result_frame(tasks=("mnist",), methods=("linear", "head2toe"), seeds=(0, 1))
    right = {"head2toe": np.arange(100) < 80}
    better = {"head2toe": np.arange(100) < 90}
    variant = Frames(
        results=results.assign(test_accuracy=0.9), predictions=predictions_of({"mnist": better}, seeds=(0, 1))
    )
    frames = frames_of(
        results.assign(test_accuracy=0.8),
        predictions=predictions_of({"mnist": right}, seeds=(0, 1)),
        recipes={("activations", "with_input"): variant},
    )
    section = shown(frames, "activations")
    assert section is not None
    rows = section.tables[0].data.set_index("variant")
    assert rows.loc["with_input", "accuracy"] == pytest.approx(0.9)
    assert rows.loc["with_input", "difference"] == pytest.approx(0.1)
    assert math.isnan(rows.loc["original", "difference"])
    assert rows.loc["with_input", "difference_low"] > 0
    assert f"90.0 {BETTER}" in set(section.tables[0].display["MNIST"])
