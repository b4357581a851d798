import numpy as np
import pandas as pd
import pytest

from h2t import paper
from h2t.methods import METHODS, PAPERS
from pipelines.report.studies.accuracy import accuracy_table, section
from tests.pipelines.report.conftest import (
    DEMO_TASKS,
    FROZEN,
    PUBLISHED,
    frames_of,
    published_results,
    result_frame,
)


def test_medians_and_means_in_the_papers_order(results: pd.DataFrame) -> None:
    table = accuracy_table(results)
    assert list(table.data["method"]) == list(FROZEN)
    assert list(table.data)[2:6] == list(DEMO_TASKS)
    row = table.data.set_index("method").loc["head2toe"]
    rows = results[results["method"] == "head2toe"]
    expected = {task: rows.loc[rows["task"] == task, "test_accuracy"].median() for task in DEMO_TASKS}
    assert row["mnist"] == expected["mnist"]
    assert row["mean_structured"] == pytest.approx((expected["dsprites_loc"] + expected["dsprites_ori"]) / 2)
    assert row["mean_all"] == pytest.approx(sum(expected.values()) / 4)
    assert table.display.iloc[4, 1] == f"{100 * expected['mnist']:.1f}"


def test_best_cells_are_those_shown_as_best_ties_included() -> None:
    frame = result_frame(tasks=["mnist"], methods=["linear", "all_l2", "head2toe"], seeds=(0,))
    frame["test_accuracy"] = [0.9001, 0.9004, 0.8]
    assert accuracy_table(frame).bold == {(0, 1), (1, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize("backbone", paper.BACKBONES)
def test_table_1_comes_out_as_printed(backbone: str) -> None:
    """The published accuracies, counted as the paper counts, give the printed means."""
    rows = published_results(backbone)
    rows["test_accuracy"] *= rows["n_test"] / (50 * np.ceil(rows["n_test"] / 50))
    data = accuracy_table(rows).data.set_index("method")
    for method in PUBLISHED:
        printed = paper.published()["table1"][backbone][method]
        assert 100 * data.loc[method, "mean_all"] == pytest.approx(printed["mean"], abs=0.05 + 1e-9)
        np.testing.assert_allclose(100 * data.loc[method].iloc[1:20].astype(float), printed["values"])


def test_missing_cells_are_dashes_and_spoil_their_means_alone(results: pd.DataFrame) -> None:
    partial = results.query("not (task == 'mnist' and method == 'all_l2')")
    table = accuracy_table(partial)
    shown = table.display.set_axis(["/".join(header) for header in table.display], axis="columns")
    row = shown.set_index("/Method").loc["+All-l2"]
    assert (row["Natural/MNIST"], row["Mean/Natural"], row["Mean/All"]) == ("–", "–", "–")
    assert row["Mean/Structured"] != "–"


def test_methods_that_are_not_the_papers_come_last_and_are_marked() -> None:
    assert set(PUBLISHED) <= set(PAPERS) <= set(METHODS)
    names = ["tap_kernels", "linear", "knn", "head2toe"]
    both = [result_frame(backbone, ["mnist"], names, seeds=(0,)) for backbone in ("b", "a")]
    table = accuracy_table(pd.concat(both))
    titles = ["Linear", "Head2Toe", "k-NN †", "Tap kernels †"]
    assert list(table.display[("", "Method")]) == 2 * titles
    assert list(table.data["method"]) == 2 * ["linear", "head2toe", "knn", "tap_kernels"]
    assert list(table.data["backbone"]) == 4 * ["a"] + 4 * ["b"]
    assert "†: not a method of the paper" in table.note
    assert "†" not in accuracy_table(result_frame(methods=["linear"])).note


def test_failed_trainings_are_no_results(results: pd.DataFrame) -> None:
    failed = results.copy()
    failed.loc[failed["seed"] == 2, ["status", "test_accuracy"]] = ["failed", np.nan]
    expected = accuracy_table(results.query("seed < 2"))
    shown = section(frames_of(failed))
    assert shown is not None
    pd.testing.assert_frame_equal(shown.tables[0].data, expected.data)


def test_backbones_are_compared_among_themselves(results: pd.DataFrame) -> None:
    other = result_frame("resnet50", ["cifar100", "kitti"], ["linear", "head2toe"], n_test=None)
    table = accuracy_table(pd.concat([results, other]))
    assert table.display.columns[0] == ("", "Backbone")
    assert len(table.data) == len(FROZEN) + 2
    assert table.data["mean_all"].notna().all()
    shown = section(frames_of(other))
    assert shown is not None
    assert shown.words.startswith("resnet50: Head2Toe has the highest mean over all tasks, ")
