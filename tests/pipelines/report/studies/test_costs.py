import numpy as np
import pandas as pd

from h2t import paper
from h2t.costs import BackboneCost, HeadSize, storage_bytes, training_flops
from h2t.tasks import find_task
from pipelines.report.studies.costs import cost_table, section
from tests.pipelines.report.conftest import COSTS, frames_of, vtab

# Table 3 states neither the operations nor the parameters; with these every printed digit comes out.
PAPER_RESNET50 = BackboneCost(forward_flops=6_947_600_000, parameters=23_481_536, embedding_width=2048)


def test_shares_of_fine_tuning_are_table_3s() -> None:
    rows = vtab(methods=("linear", "head2toe"), seeds=(0,))
    printed = dict(zip(paper.task_titles(), paper.published()["table3"], strict=True))
    chosen = paper.hyperparameters("resnet50")
    for position, row in rows.iterrows():
        title = find_task(row["task"]).title
        keep_fraction, n_features, n_classes, *_ = printed[title]
        head, steps = HeadSize(n_features, int(n_features * keep_fraction), n_classes), chosen[title].steps
        flops = training_flops(row["method"], PAPER_RESNET50, head, steps)
        size = storage_bytes(row["method"], PAPER_RESNET50, head)
        columns = ["n_classes", "steps", "modelled_flops", "modelled_storage_bytes"]
        rows.loc[position, columns] = n_classes, steps, flops, size
    data = cost_table(rows, {"resnet50": PAPER_RESNET50}).data.query("method == 'head2toe'")
    for record in data.to_dict("records"):
        shares = [record[name] for name in ("flops_vs_finetuning", "size_vs_finetuning", "size_vs_linear")]
        assert [round(share, 6) for share in shares] == printed[find_task(record["task"]).title][3:]


def test_what_is_not_known_is_a_dash(results: pd.DataFrame) -> None:
    display = cost_table(results.assign(peak_memory_bytes=np.nan), {}).display
    assert set(display["of fine-tuning"]) == set(display["Peak memory"]) == {"–"}
    assert display["Training"].str.endswith(" s").all()


def test_words_need_the_costs_of_the_backbone(results: pd.DataFrame) -> None:
    known, unknown = (section(frames_of(results, costs=costs)) for costs in (COSTS, {}))
    assert known is not None
    assert "of the operations of fine-tuning" in known.words
    assert unknown is not None
    assert unknown.words == ""
