"""The small images of the report: which are shown, and what of a page they take."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.report.frames import Frames
from pipelines.report.studies import images as images_of_page
from pipelines.task_data import open_task
from pipelines.thumbnails import (
    N_TEST,
    N_TRAINING,
    SIDE,
    disagreements,
    one_of_each_class,
    thumbnail,
    thumbnail_rows,
)
from tests.pipelines.conftest import small_config, write_task
from tests.pipelines.report.conftest import predictions_of, thumbnail_frame


def test_training_images_are_one_of_each_class_in_turn() -> None:
    labels = np.array([2, 2, 0, -1, 1, 0, 2])
    assert one_of_each_class(labels) == [2, 4, 0, 5, 1, 6]
    assert len(one_of_each_class(np.arange(500))) == N_TRAINING


def test_disagreements_are_those_that_seeds_agree_on_most() -> None:
    right = {"linear": np.array([1, 0, 0, 1], bool), "head2toe": np.array([1, 1, 0, 0], bool)}
    found = list(disagreements(predictions_of({"mnist": right}, seeds=(0, 1))))
    assert found == [("gained", (1, 1)), ("lost", (3, 1))]
    assert list(disagreements(predictions_of({"mnist": {"linear": right["linear"]}}))) == []
    many = {"linear": np.zeros(50, bool), "head2toe": np.ones(50, bool)}
    assert [row for _, (row, _) in disagreements(predictions_of({"mnist": many}))] == list(range(N_TEST))


@pytest.mark.parametrize("shape", [(40, 300, 3), (300, 40, 3), (8, 8, 3)])
def test_thumbnails_are_small_and_keep_their_shape(shape: tuple[int, int, int]) -> None:
    data = thumbnail(np.zeros(shape, np.uint8))
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == "WEBP"
        assert max(opened.size) <= SIDE
        assert opened.size[0] / opened.size[1] == pytest.approx(shape[1] / shape[0], rel=0.15)


def test_rows_of_a_task_name_classes_and_wrong_predictions(tmp_path: Path) -> None:
    write_task(tmp_path, "first")
    task = open_task(small_config(tmp_path, tasks=["first"]), "first")
    right = {"linear": np.arange(12) < 6, "head2toe": np.arange(12) < 8}
    predictions = predictions_of({"first": right}).assign(label=task.labels["test"][np.arange(24) % 12])
    predictions["prediction"] = np.where(
        np.concatenate([right["linear"], right["head2toe"]]), predictions["label"], 1 - predictions["label"]
    )
    rows = list(thumbnail_rows(task, predictions))
    kinds = [row["kind"] for row in rows]
    assert kinds == ["training"] * N_TRAINING + ["gained"] * 2
    assert [row["index"] for row in rows[-2:]] == [6, 7]
    assert all(row["prediction"] == str(1 - int(row["label"])) for row in rows[-2:])
    assert all(row["prediction"] is None for row in rows[:-2])


def test_a_page_takes_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = images_of_page.section(Frames(thumbnails=thumbnail_frame()))
    assert whole is not None
    assert [len(strip.pictures) for strip in whole.strips] == [3] * 6
    assert whole.strips[1].title == "MNIST: Head2Toe right, linear wrong"
    assert whole.strips[1].pictures[0].text == "3, not 8"
    size = sum(len(picture.source) for picture in whole.strips[0].pictures)
    monkeypatch.setattr(images_of_page, "LIMIT", size + 10)
    part = images_of_page.section(Frames(thumbnails=thumbnail_frame()))
    assert part is not None
    assert len(part.strips) == 1
    assert "Left out to keep the page small: 15 images." in part.words
    assert images_of_page.section(Frames()) is None
