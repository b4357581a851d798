import numpy as np
import pytest

from pipelines.report.studies.published import paper_table, section
from tests.pipelines.report.conftest import PUBLISHED, frames_of, published_results, result_frame, vtab


def test_the_papers_results_do_not_differ_from_themselves() -> None:
    table = paper_table(published_results("resnet50"))
    assert table is not None
    assert len(table.data) == len(PUBLISHED) * (19 + 1)
    np.testing.assert_allclose(table.data["difference"], 0, atol=1e-12)
    tasks = table.data[~table.data["task"].str.startswith("mean")]
    np.testing.assert_allclose(tasks["paper_corrected"], tasks["test_accuracy"])
    kitti = tasks.query("task == 'kitti' and method == 'linear'").iloc[0]
    assert kitti["paper_corrected"] == pytest.approx(kitti["paper_accuracy"] * 750 / 711)


def test_a_backbone_keeps_its_published_figures_under_the_name_of_its_run() -> None:
    rows = published_results("resnet50").assign(backbone="resnet50 (mine)")
    shown = section(frames_of(rows))
    assert shown is not None
    assert "by 0.0 at most" in shown.words


def test_no_comparison_on_other_test_images_or_backbones() -> None:
    assert paper_table(result_frame("resnet50", ["dsprites_loc"])) is None
    assert paper_table(vtab("efficientnet_lite0")) is None
