"""Tap kernels through the pipeline: from stored features tap by tap, and without storing any."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from h2t.errors import UserError
from h2t.features import TapFeatures, keep_features
from h2t.head2toe import Head, fit, logits
from h2t.hyperparameters import Hyperparameters
from pipelines import grams as grams_stage
from pipelines.artifacts import features, grams
from pipelines.config import Config
from pipelines.feature_files import open_features, read_features
from pipelines.gram_files import open_grams
from pipelines.model_files import read_head
from pipelines.run import run_stages
from pipelines.run_directory import RunDirectory
from pipelines.session import Session
from pipelines.task_data import open_task
from tests.pipelines.conftest import frame, result_rows, small_config

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def stored(images: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with features, at two target sizes."""
    run = RunDirectory(str(tmp_path_factory.mktemp("stored")))
    screen = Console(file=io.StringIO())
    run_stages(config(images, methods=["tap_kernels"]), run.uri, ["extract", "sweep"], screen)
    return run


def config(images: Path, **settings: object) -> Config:
    return small_config(images, ("first",), **settings)


def test_products_are_those_of_unit_features_less_their_means(stored: RunDirectory, images: Path) -> None:
    task = open_task(config(images), "first")
    for size in task.config.grid.target_size:
        names = features(task, "train", size).names(stored)
        matrix = read_features(stored, names)
        product = grams(task, "train", size, matrix.layout)
        products = open_grams(stored, product, matrix.layout)
        np.testing.assert_array_equal(products.labels, matrix.labels)
        for tap, columns in enumerate(matrix.layout.slices):
            values = matrix.values[:, columns].astype(float)  # type: ignore[index]
            norms = np.linalg.norm(values, axis=1, keepdims=True)
            rows = values / np.where(norms > 0, norms, 1)
            rows -= rows.mean(0)
            np.testing.assert_allclose(products.read(tap), rows @ rows.T, atol=1e-6)


def test_features_in_files_give_the_heads_of_features_in_memory(stored: RunDirectory, images: Path) -> None:
    task = open_task(config(images), "first")
    names = features(task, "train", 16).names(stored)
    there, matrix = open_features(stored, names), read_features(stored, names)
    assert isinstance(there.values, TapFeatures)
    kept = np.arange(3, matrix.layout.n_features, 7)
    np.testing.assert_array_equal(
        keep_features(there.values, there.layout, kept), keep_features(matrix.values, matrix.layout, kept)
    )
    points = [Hyperparameters("tap_kernels", 16, 0.0, 0, rounds) for rounds in (0.0, 1.0)]
    points += [Hyperparameters(name, 16, 0.0, 0, 1.0, 0.1) for name in ("tap_kernels_kept", "all_ridge")]
    rows = np.arange(2, 18)

    def fitted(values: np.ndarray | TapFeatures) -> dict[Hyperparameters, Head]:
        heads = fit(values, matrix.labels, matrix.layout, points, n_classes=2, embedding=matrix.embedding,
                    rows=rows)  # fmt: skip
        return {head.hyperparameters: head for head in heads}

    expected = fitted(matrix.values)
    for point, head in fitted(there.values).items():
        np.testing.assert_array_equal(head.weight, expected[point].weight)
        np.testing.assert_array_equal(head.kept, expected[point].kept)
        outputs = logits(head, there.values, rows)
        np.testing.assert_allclose(outputs, logits(head, matrix.values, rows), atol=1e-4)


def test_a_run_without_stored_features_gives_the_same_results(
    stored: RunDirectory, images: Path, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path))
    settings = {"methods": ["tap_kernels"], "features": "gram"}
    stages = ["extract", "sweep", "evaluate"]
    run_stages(config(images, **settings), run.uri, stages, Console(file=io.StringIO()))
    assert not run.names("features", recursive=True)
    assert len(run.names("grams", recursive=True)) == len(stored.names("grams", recursive=True))
    ours, theirs = (
        frame(directory, "trials").query("method == 'tap_kernels' and coefficient == 0")
        for directory in (run, stored)
    )
    keys = ["target_size", "fold"]
    ours, theirs = (rows.set_index(keys).sort_index() for rows in (ours, theirs))
    np.testing.assert_allclose(ours["validation_loss"], theirs["validation_loss"], atol=1e-3)
    np.testing.assert_array_equal(ours["validation_accuracy"], theirs["validation_accuracy"])
    assert len(result_rows(run)) == 2
    task = open_task(config(images, **settings), "first")
    (name, *_) = [name for name in run.names("heads", recursive=True) if "tap_kernels" in name]
    head, _ = read_head(run, name)
    matrix = read_features(stored, features(task, "train", head.hyperparameters.target_size).names(stored))
    (expected,) = fit(matrix.values, matrix.labels, matrix.layout, [head.hyperparameters], n_classes=2,
                      embedding=matrix.embedding)  # fmt: skip
    outputs, right = (logits(member, matrix.values) for member in (head, expected))
    outputs, right = (values - values.mean(1, keepdims=True) for values in (outputs, right))
    np.testing.assert_allclose(outputs, right, atol=0.02 * np.abs(right).max())
    assert head.train_loss == pytest.approx(expected.train_loss, rel=0.02)


def test_several_passes_give_what_one_does_and_only_missing_taps_are_multiplied(
    stored: RunDirectory, images: Path, tmp_path: Path
) -> None:
    run, screen = RunDirectory(str(tmp_path)), Console(file=io.StringIO())
    few = config(images, methods=["tap_kernels"], features={"store": "gram"},
                 resources={"memory_per_trial_gb": 4e-5})  # fmt: skip
    session = Session(few, run, screen)
    numbers = grams_stage.passes(session, 20)
    assert 2 < len(set(numbers)) < len(numbers)
    widths = np.sum([layout.widths for layout in session.layouts.values()], axis=0)
    for number in set(numbers):
        held = widths[np.array(numbers) == number]
        assert len(held) == 1 or 4 * 20 * held.sum() <= 4e-5 * 2**30
    run_stages(few, run.uri, ["extract"], screen)
    for name in run.names("grams", recursive=True):
        ours, theirs = (directory.read_table([name])["products"] for directory in (run, stored))
        ours, theirs = (column.combine_chunks().flatten().to_numpy() for column in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    lost = run.names("grams", recursive=True)[3]
    before = {
        name: (Path(run.uri) / name).stat().st_mtime_ns
        for name in run.names("grams", recursive=True)
        if name != lost
    }
    run.delete(lost)
    run_stages(few, run.uri, ["extract"], screen)
    assert run.exists(lost)
    assert before == {name: (Path(run.uri) / name).stat().st_mtime_ns for name in before}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["tap_kernels", "head2toe"]}, "head2toe needs features"),
        ({"methods": ["tap_kernels_kept"]}, "tap_kernels_kept needs features"),
        ({"methods": ["tap_kernels"], "features": {"store": "gram", "precision": "float16"}}, "float16"),
    ],
)
def test_what_needs_features_is_refused_without(
    images: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(images, **({"features": "gram"} | settings))


def test_too_many_images_are_refused_before_any_work(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("h2t.heads.tap_kernels.MOST_ROWS", 19)
    recipe = config(images, methods=["linear", "tap_kernels"])
    with pytest.raises(UserError, match="20 training images; expected at most 19"):
        run_stages(recipe, str(tmp_path / "run"), ["extract"], Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_a_sweep_without_products_names_the_stage_to_run(images: Path, tmp_path: Path) -> None:
    recipe = config(images, methods=["tap_kernels"], features="gram")
    with pytest.raises(UserError, match="run the extract stage first"):
        run_stages(recipe, str(tmp_path), ["sweep"], Console(file=io.StringIO()))
