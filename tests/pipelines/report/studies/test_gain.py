import pandas as pd

from h2t.tasks import find_task
from pipelines.report.studies.gain import gains, section
from tests.pipelines.report.conftest import DEMO_TASKS, frames_of, published_results, result_frame


def test_gains_are_in_the_order_of_domain_affinity_where_it_is_known(results: pd.DataFrame) -> None:
    assert list(gains(results)["task"]) == list(DEMO_TASKS)
    rows = gains(published_results("resnet50"))
    assert [find_task(task).title for task in rows["task"]][:2] == ["dSpr-Loc", "Clevr-Dist"]
    assert len(rows) == 19


def test_words_tell_the_largest_gain() -> None:
    rows = result_frame(tasks=["mnist", "dsprites_loc"], methods=["linear", "head2toe"], seeds=(0,))
    shown = section(frames_of(rows.assign(test_accuracy=[0.5, 0.45, 0.25, 0.5])))
    assert shown is not None
    assert shown.words == (
        "efficientnet_lite0: on 2 tasks Head2Toe gains 10.0 points of accuracy over a linear probe on "
        "average (+25.0 on dSpr-Loc), at 0.5 % of the training operations of fine-tuning for as many steps."
    )
    assert shown.on_top == "highlight"
    assert shown.figures[0].description == "In points of percent: MNIST −5.0; dSpr-Loc +25.0."
