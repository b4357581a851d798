from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

from h2t.adapter import Adapter
from h2t.backbones.aggregation import Aggregation
from h2t.backbones.loading import load_backbone
from h2t.backbones.tap_reader import feature_layout
from h2t.costs import within_depth
from h2t.errors import UserError
from h2t.estimator import Head2ToeClassifier
from h2t.features import FeatureLayout
from h2t.head2toe import logits
from h2t.methods import METHODS

LAYOUT = FeatureLayout(("upper", "lower"), (32, 32))


@parametrize_with_checks([Head2ToeClassifier(keep_fraction=1.0, learning_rate=0.1, steps=100)])
def test_scikit_learns_own_checks(estimator, check) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:600].astype(np.float32), y[:600]


def test_cross_validation_on_digits(digits) -> None:
    classifier = Head2ToeClassifier(layout=LAYOUT, keep_fraction=0.8, learning_rate=0.1, steps=200)
    assert cross_val_score(classifier, *digits, cv=3).mean() > 0.8


def test_grid_search_over_the_fraction_of_features(digits) -> None:
    search = GridSearchCV(
        Head2ToeClassifier(learning_rate=0.1, steps=100), {"keep_fraction": [0.05, 0.8]}, cv=2
    )
    search.fit(*digits)
    assert search.best_params_ == {"keep_fraction": 0.8}
    assert len(search.best_estimator_.head_.kept) == 51


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.trains_backbone])
def test_every_method_on_frozen_features_learns(digits, method: str) -> None:
    X, y = digits
    classifier = Head2ToeClassifier(method, layout=LAYOUT, keep_fraction=0.5, learning_rate=0.1, steps=100)
    classifier.fit(X, y)
    assert classifier.head_.hyperparameters.method == method
    assert classifier.score(X, y) > 0.6


def test_predictions_are_those_of_the_head_under_the_users_names(digits) -> None:
    X, y = digits
    names = np.array([f"digit {number}" for number in range(10)])
    classifier = Head2ToeClassifier("all_l1", layout=LAYOUT, learning_rate=0.1, steps=50).fit(X, names[y])
    np.testing.assert_array_equal(classifier.predict(X), names[logits(classifier.head_, X).argmax(1)])
    assert set(classifier.classes_) == set(names)


def test_the_random_state_draws_order_and_weights(digits) -> None:
    first, again, other = (
        Head2ToeClassifier("all_l2", steps=20, random_state=seed).fit(*digits).head_.weight
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_linear_reads_the_embedding_alone(digits) -> None:
    classifier = Head2ToeClassifier("linear", layout=LAYOUT, steps=10).fit(*digits)
    np.testing.assert_array_equal(classifier.head_.kept, np.arange(32, 64))
    classifier.set_params(embedding="upper").fit(*digits)
    np.testing.assert_array_equal(classifier.head_.kept, np.arange(32))


def test_parameters_survive_cloning() -> None:
    classifier = clone(Head2ToeClassifier("all_l2", layout=LAYOUT, steps=7)).set_params(keep_fraction=0.5)
    expected = {"method": "all_l2", "layout": LAYOUT, "steps": 7, "keep_fraction": 0.5}
    assert classifier.get_params().items() >= expected.items()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "head2tow"}, "head2toe"),
        ({"method": "finetune"}, "trains the backbone"),
        ({"layout": FeatureLayout(("a",), (5,))}, "5 features, got 64"),
        ({"keep_fraction": 0.001}, "keeps none"),
        (
            {"method": "linear", "layout": LAYOUT, "embedding": "louwer"},
            "unknown tap 'louwer': did you mean lower",
        ),
    ],
)
def test_wrong_parameters_are_the_users(digits, parameters, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Head2ToeClassifier(**parameters).fit(*digits)


def test_images_through_a_backbone() -> None:
    random = np.random.default_rng(0)
    y = np.arange(24) % 2
    images = np.array([[200, 40, 40], [40, 40, 200]])[y][:, None, None] + random.integers(
        -30, 30, (24, 48, 48, 3)
    )
    images = images.astype(np.uint8)
    backbone = load_backbone("test_resnet", weights="random", image_size=48)
    classifier = Head2ToeClassifier(backbone=backbone, target_size=32, learning_rate=0.1, steps=20)
    assert cross_val_score(classifier, images, y, cv=3).mean() > 0.8
    classifier.fit(list(images), y)
    adapter = Adapter(backbone, classifier.head_)
    np.testing.assert_array_equal(adapter.predict(list(images)).labels, classifier.predict(list(images)))
    paper, aggregation = classifier.layout_, Aggregation(pooling="average_max")
    classifier.set_params(aggregation=aggregation).fit(list(images), y)
    assert classifier.layout_.n_features > paper.n_features
    adapter = Adapter(backbone, classifier.head_, aggregation=aggregation)
    np.testing.assert_array_equal(adapter.predict(list(images)).labels, classifier.predict(list(images)))


def test_no_more_of_a_forward_pass_is_read_than_asked_for() -> None:
    random, y = np.random.default_rng(0), np.arange(24) % 2
    colours = np.array([[200, 40, 40], [40, 40, 200]])[y][:, None, None]
    images = list((colours + random.integers(-30, 30, (24, 48, 48, 3))).astype(np.uint8))
    backbone = load_backbone("test_resnet", weights="random", image_size=48)
    settings = {"backbone": backbone, "target_size": 32, "learning_rate": 0.1, "steps": 20}
    classifier = Head2ToeClassifier(max_depth=0.5, keep_fraction=(0.1, 0.5), cv=2, **settings)
    classifier.fit(images, y)
    early = within_depth(backbone, 0.5)
    assert classifier.layout_ == classifier.head_.layout == feature_layout(early, 32)
    assert 0 < len(classifier.layout_.taps) < len(backbone.taps)
    assert classifier.best_params_["keep_fraction"] in (0.1, 0.5)
    assert (classifier.predict(images) == y).mean() > 0.9
    with pytest.raises(UserError, match=r"max_depth 0\.5: linear reads the embedding"):
        Head2ToeClassifier("linear", max_depth=0.5, **settings).fit(images, y)
    with pytest.raises(UserError, match="max_depth: expected a backbone"):
        Head2ToeClassifier(max_depth=0.5).fit(np.zeros((4, 3)), [0, 1, 0, 1])


@pytest.mark.slow  # its processes import torch
def test_several_processes_come_to_what_one_does(digits) -> None:
    classifier = Head2ToeClassifier(layout=LAYOUT, keep_fraction=0.8, learning_rate=0.1, steps=50)
    grid = {"keep_fraction": [0.05, 0.8], "learning_rate": [0.1, 0.01]}
    scores, searches = [], []
    for n_jobs in (1, 2):
        with parallel_config("loky", inner_max_num_threads=1):  # several round otherwise
            scores.append(cross_val_score(classifier, *digits, cv=3, n_jobs=n_jobs))
            searches.append(GridSearchCV(classifier, grid, cv=2, n_jobs=n_jobs).fit(*digits))
    np.testing.assert_array_equal(*scores)
    np.testing.assert_array_equal(*(search.cv_results_["mean_test_score"] for search in searches))
    first, second = (search.best_estimator_.head_ for search in searches)
    np.testing.assert_array_equal(first.weight, second.weight)
    assert searches[0].best_params_ == searches[1].best_params_


@pytest.mark.slow
def test_processes_load_a_backbone_by_its_name() -> None:
    random, y = np.random.default_rng(0), np.arange(16) % 2
    colours = np.array([[200, 40, 40], [40, 40, 200]])[y][:, None, None]
    images = list((colours + random.integers(-30, 30, (16, 48, 48, 3))).astype(np.uint8))
    classifier = Head2ToeClassifier(
        backbone="efficientnet_lite0", image_size=64, target_size=32, learning_rate=0.1, steps=20
    )
    with parallel_config("loky", inner_max_num_threads=1):
        scores = [cross_val_score(classifier, images, y, cv=2, n_jobs=n_jobs) for n_jobs in (1, 2)]
    np.testing.assert_array_equal(*scores)


def test_one_fit_chooses_by_cross_validation_as_a_grid_search_would(digits, capsys) -> None:
    X, y = digits
    grid = {"learning_rate": (0.1, 0.01), "keep_fraction": (0.05, 0.8)}
    classifier = Head2ToeClassifier(layout=LAYOUT, steps=100, cv=2, verbose=1, **grid).fit(X, y)
    assert classifier.best_params_["keep_fraction"] == 0.8
    assert len(classifier.cv_results_) == 4
    assert classifier.best_score_ == max(classifier.cv_results_.values())
    alone = clone(classifier).set_params(cv=None, verbose=0, **classifier.best_params_).fit(X, y)
    np.testing.assert_array_equal(alone.head_.weight, classifier.head_.weight)
    assert "fold 2 of 2: 4 candidates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep_fraction": (0.1, 0.2)}, "keep_fraction: expected one value, got 2"),
        ({"keep_fraction": (), "cv": 2}, "keep_fraction: expected at least one value"),
        ({"cv": 1}, "cross-validation needs at least 2 folds"),
    ],
)
def test_candidates_that_cannot_be_searched_are_the_users(digits, parameters, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Head2ToeClassifier(**parameters).fit(*digits)


def test_a_backbone_by_name_and_columns_of_paths_in_a_pipeline(tmp_path: Path) -> None:
    random, y = np.random.default_rng(0), np.arange(24) % 2
    for number, label in enumerate(y):
        colour = np.array([[200, 40, 40], [40, 40, 200]])[label] + random.integers(-30, 30, (48, 48, 3))
        Image.fromarray(colour.astype(np.uint8)).save(tmp_path / f"{number}.png")
    paths = pd.DataFrame({"path": [str(tmp_path / f"{number}.png") for number in range(24)]})
    # A name of a shipped backbone, whose real weights come with a package.
    classifier = Head2ToeClassifier(backbone="efficientnet_lite0", image_size=64, target_size=32,
                                    learning_rate=(0.1, 0.01), steps=20, cv=2)  # fmt: skip
    model = make_pipeline(FunctionTransformer(), classifier)
    assert cross_val_score(model, paths, y, cv=2, n_jobs=1).mean() > 0.9
    model.fit(paths["path"].to_frame(), y)
    assert (model.predict(paths) == y).mean() > 0.9
    with pytest.raises(UserError, match="one column of images, got 2 columns"):
        classifier.fit(paths.assign(more=1), y)
