import pytest
import torch

from h2t import costs, paper
from h2t.costs import PAPER_RESNET50, BackboneCost, HeadSize

TINY = BackboneCost(forward_flops=1000, parameters=50, embedding_width=8)
HEAD = HeadSize(n_features=40, n_kept=4, n_classes=3)


@pytest.mark.parametrize("title", paper.task_titles())
def test_table_3_to_every_printed_digit(title):
    printed, chosen = paper.relative_costs()[title], paper.hyperparameters("resnet50")[title]
    assert printed.keep_fraction == chosen.keep_fraction
    head = HeadSize(printed.n_features, int(printed.n_features * printed.keep_fraction), printed.n_classes)
    found = costs.relative_cost(PAPER_RESNET50, head, chosen.steps)
    assert tuple(round(share, 6) for share in found) == printed[3:]


def test_average_row_of_table_3():
    rows = list(paper.relative_costs().values())
    averages = [sum(row[column] for row in rows) / len(rows) for column in (3, 4, 5)]
    assert averages == pytest.approx(paper.published()["table3_average"], abs=1.1e-6)


def test_searching_for_the_fraction_costs_a_fifth_more():
    """Appendix A says 18 %; its fractions add up to 0.1885."""
    assert costs.search_factor((0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)) == pytest.approx(1.1885)


def test_operations_by_hand():
    frozen = 1000 * 1000 + 4 * 40 * 3 * 128 * 10
    tuning = 3 * (1000 + 2 * 8 * 3) * 128 * 10
    assert costs.training_flops("head2toe", TINY, HEAD, 10) == frozen
    assert costs.training_flops("all_l1", TINY, HEAD, 10) == frozen
    assert costs.training_flops("linear", TINY, HEAD, 10) == 1000 * 1000 + 4 * 8 * 3 * 128 * 10
    assert costs.training_flops("finetune", TINY, HEAD, 10) == tuning
    assert costs.training_flops("scratch", TINY, HEAD, 10) == tuning
    through_taps = 3 * (1000 + 2 * 4 * 3) * 128 * 20
    assert costs.training_flops("head2toe_ft", TINY, HEAD, 10, finetuning_steps=20) == frozen + through_taps


def test_bytes_by_hand():
    expected = {
        "linear": 4 * 8 * 3,
        "all_l2": 4 * 40 * 3,
        "head2toe": 4 * 4 * 3 + 5,
        "finetune": 4 * (50 + 8 * 3),
        "head2toe_ft": 4 * (50 + 4 * 3) + 5,
    }
    assert {method: costs.storage_bytes(method, TINY, HEAD) for method in expected} == expected


def test_measured_operations_are_those_of_the_layers():
    from h2t.backbones.loading import load_backbone

    backbone = load_backbone("test_resnet", weights="random", image_size=64)
    measured = costs.measure_backbone(backbone)
    assert measured.embedding_width == backbone.model.num_features
    head = sum(weight.numel() for weight in backbone.model.get_classifier().parameters())
    assert measured.parameters == sum(weight.numel() for weight in backbone.model.parameters()) - head

    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        counted += 2 * output.numel() * module.weight[0].numel()

    layers = [m for m in backbone.model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        backbone.model(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    assert measured.forward_flops == counted
