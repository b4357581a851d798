import pandas as pd

from pipelines.report.studies.affinity import affinity_table, correlations, section
from tests.pipelines.report.conftest import frames_of, published_results, result_frame


def test_affinity_and_its_correlations() -> None:
    table = affinity_table(pd.concat([published_results("resnet50"), published_results("vitb16")]))
    assert table is not None
    assert len(table.data) == 38
    assert correlations(table.data[table.data["backbone"] == "resnet50"])[1].endswith("1.00 over 19 tasks.")
    assert any(
        "affinity of resnet50 with that of vitb16: 0.8" in sentence for sentence in correlations(table.data)
    )
    assert affinity_table(result_frame()) is None
    assert correlations(table.data.head(2)) == []


def test_the_published_correlations_stand_beside_ours() -> None:
    rows = published_results("resnet50")
    rows["test_accuracy"] *= rows["n_test"] / (50 * -(-rows["n_test"] // 50))
    table = affinity_table(rows)
    assert table is not None
    assert "correlation of gain with affinity, resnet50: -0.79 over 19 tasks" in table.note
    assert "Table 1 gives -0.79 (ResNet-50) and -0.24 (ViT-B/16)" in table.note
    assert "0.87 for affinity between the two" in table.note


def test_words_name_the_ends_and_tasks_without_a_gain_are_not_drawn() -> None:
    rows = published_results("resnet50")
    shown = section(frames_of(rows))
    assert shown is not None
    assert shown.words.startswith("resnet50: dSpr-Loc (")
    assert len(shown.figures) == 1
    without = section(frames_of(rows[rows["method"] != "head2toe"]))
    assert without is not None
    assert without.figures == ()
