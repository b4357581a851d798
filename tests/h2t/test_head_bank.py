import numpy as np
import torch

from h2t.features import FeatureLayout
from h2t.head2toe import Head, HeadBank, predict
from h2t.hyperparameters import Hyperparameters

LAYOUT = FeatureLayout(("a", "b", "c"), (5, 1, 7))
WIDER = FeatureLayout(("a", "b", "c"), (10, 1, 14))


def made_up_head(
    kept: list[int], seed: int, layout: FeatureLayout, target_size: int, n_classes: int = 3
) -> Head:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((len(kept), n_classes), np.float32)
    settings = Hyperparameters("head2toe", target_size, 0.1, 5)
    bias = generator.standard_normal(n_classes).astype(np.float32)
    return Head(settings, seed, np.array(kept, np.int64), layout, weight, bias, 0.0)


def test_a_bank_predicts_what_its_heads_predict_alone() -> None:
    heads = [
        made_up_head(list(range(13)), 0, LAYOUT, 8),
        made_up_head([1, 2, 5, 12], 1, LAYOUT, 8),
        made_up_head(list(range(13)), 2, LAYOUT, 8),
        made_up_head([0, 24], 3, WIDER, 16),
        made_up_head([1, 2, 5, 12], 4, LAYOUT, 8),
    ]
    generator = np.random.default_rng(9)
    features = {size: generator.standard_normal((6, n), np.float32) for size, n in ((8, 13), (16, 25))}
    features[8][0] = 0
    bank = HeadBank(heads)
    found = bank.predict({size: torch.from_numpy(values) for size, values in features.items()})
    expected = [predict(head, features[head.settings.target_size]).argmax(1) for head in heads]
    assert len(bank.groups) == 3
    assert bank.target_sizes == [8, 16]
    np.testing.assert_array_equal(found, np.stack(expected, 1))
