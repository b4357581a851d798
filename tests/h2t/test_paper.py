import math
from itertools import pairwise

import pytest

from h2t import metrics, paper
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from h2t.tasks import VTAB_1K


def test_titles_and_groups_are_those_of_the_tasks() -> None:
    assert paper.task_titles() == tuple(task.title for task in VTAB_1K)
    groups = {title: group for group, titles in paper.published()["groups"].items() for title in titles}
    assert groups == {task.title: task.group for task in VTAB_1K}


@pytest.mark.parametrize("backbone", paper.BACKBONES)
def test_means_of_table_1_are_the_printed_ones(backbone) -> None:
    for method, published in paper.published()["table1"][backbone].items():
        row = paper.accuracies(backbone, method)
        assert method in METHODS
        assert list(row) == list(paper.task_titles())
        assert sum(row.values()) / 19 == pytest.approx(published["mean"], abs=0.05 + 1e-9)


def test_table_4_lacks_what_the_paper_took_from_others() -> None:
    assert paper.deviations("resnet50", "scratch") == {}
    assert len(paper.deviations("vitb16", "scratch")) == 19


def test_what_is_not_published_is_empty() -> None:
    assert paper.accuracies("efficientnet_lite0", "linear") == {}
    assert paper.hyperparameters("efficientnet_lite0") == {}
    assert paper.domain_affinity("efficientnet_lite0") == {}


def test_hyperparameters_of_table_2() -> None:
    chosen = paper.hyperparameters("resnet50")
    assert chosen["dSpr-Ori"] == Hyperparameters("head2toe", 512, 0.01, 500, 1e-5, 0.2)
    assert paper.hyperparameters("vitb16")["KITTI-Dist"].target_size == 32448
    assert list(chosen) == list(paper.task_titles())


@pytest.mark.parametrize(("key", "title"), [("kitti", "KITTI-Dist"), ("dtd", "DTD"), ("pets", "Pets")])
def test_corrected_values(key: str, title: str) -> None:
    n_test = {task.title: task.n_test for task in VTAB_1K}[title]
    for backbone, rows in paper.published()["table1_corrected"].items():
        for method, row in rows.items():
            exact = paper.corrected(paper.accuracies(backbone, method)[title], n_test)
            assert exact == pytest.approx(row[key], abs=0.05 + 1e-9)


def test_corrected_means() -> None:
    sizes = {task.title: task.n_test for task in VTAB_1K}
    for backbone, rows in paper.published()["table1_corrected"].items():
        for method, row in rows.items():
            exact = [
                paper.corrected(value, sizes[title])
                for title, value in paper.accuracies(backbone, method).items()
            ]
            assert sum(exact) / 19 == pytest.approx(row["mean"], abs=0.006)


def test_correcting_undoes_the_official_count() -> None:
    assert paper.corrected(100 * metrics.official_accuracy(500, 711), 711) == pytest.approx(100 * 500 / 711)


def test_affinity_is_linear_minus_scratch() -> None:
    affinity = paper.domain_affinity("resnet50")
    assert next(iter(affinity)) == "dSpr-Loc"
    assert math.isclose(affinity["Pets"], 87.4 - 13.3)


def test_spearmans_correlations_of_table_1() -> None:
    """Appendix F has 0.907 between the backbones."""
    assert paper.affinity_correlation() == pytest.approx(0.868, abs=5e-4)
    assert paper.gain_correlation("resnet50") == pytest.approx(-0.789, abs=5e-4)
    assert paper.gain_correlation("vitb16") == pytest.approx(-0.239, abs=5e-4)


@pytest.mark.parametrize("backbone", paper.BACKBONES)
def test_rounding_changes_the_order_of_no_two_affinities(backbone) -> None:
    """Both accuracies of a difference are rounded to 0.1, so two differences are off by 0.2 at most."""
    affinities = list(paper.domain_affinity(backbone).values())
    gaps = [after - before for before, after in pairwise(affinities)]
    assert min(gaps) >= 0.2 - 1e-9
