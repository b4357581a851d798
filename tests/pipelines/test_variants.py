"""Settings that other tests leave at their defaults, taken through the whole pipeline."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from h2t.adapter import Adapter
from h2t.backbones.aggregation import Aggregation
from h2t.backbones.tap_reader import feature_layout
from pipelines import artifacts
from pipelines.run import STAGES, run_stages
from pipelines.run_directory import RunDirectory
from pipelines.task_data import open_task
from tests.pipelines.conftest import frame, png, small_config, write_task

pytestmark = pytest.mark.usefixtures("cluster")
SMALL_GRID = {"target_size": [16], "steps": [5], "keep_fraction": [0.2]}
# Above chance on two classes told apart by brightness, whatever the precision.
LEARNED = 0.7


def bright_or_dark(label: int, generator: np.random.Generator) -> bytes:
    return png(generator.integers(0, 120, (20, 24, 3), np.uint8) + np.uint8(100 * label))


def run_variant(tmp_path: Path, images: dict[str, Any], **settings: Any) -> RunDirectory:
    """A run of one task whose images lie elsewhere than other tests have them."""
    config = small_config(tmp_path, ("first",), grid=SMALL_GRID, methods=["linear", "head2toe"], **settings)
    data = config.model_dump(mode="json")
    data["tasks"][0]["images"] = images
    run = RunDirectory(str(tmp_path / "run"))
    run_stages(type(config).model_validate(data, strict=False), run.uri, list(STAGES), Console(quiet=True))
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"tokens": "grid"},
        {"pooling": "average_max"},
        {"pooling": "average_std"},
        {"tokens": "grid", "pooling": "pyramid"},
    ],
)
def test_other_aggregations_go_from_the_recipe_to_the_adapter(
    images: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    config = small_config(
        images,
        ("first",),
        backbone={"name": "test_vit", "image_size": 64, **options},
        grid=SMALL_GRID | {"target_size": [256]},
        methods=["head2toe"],
        seeds=[0],
    )
    run = RunDirectory(str(tmp_path))
    run_stages(config, run.uri, list(STAGES), Console(quiet=True))
    (name,) = run.names("heads", recursive=True)
    adapter = Adapter.load(run.read(name))
    assert adapter.aggregation == Aggregation.of(options)
    stored = frame(run, "predictions").sort_values("index")
    encoded = pd.read_parquet(images / "first" / "test.parquet")["image_bytes"].tolist()
    found = adapter.predict(encoded)
    np.testing.assert_array_equal(found.labels, stored["prediction"])
    np.testing.assert_allclose(found.probabilities.max(axis=1), stored["probability"], atol=1e-3)
    paper = feature_layout(adapter.backbone, 256)
    assert frame(run, "results")["n_features"].item() == adapter.head.layout.n_features > paper.n_features


@pytest.mark.slow
def test_a_folder_of_images_with_shuffled_folds_bicubic_and_heads_in_bfloat16(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 12)):
        for number in range(count):
            path = tmp_path / "images" / split / ("dark", "bright")[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bright_or_dark(number % 2, generator))
    run = run_variant(
        tmp_path,
        {"format": "folder", "root": str(tmp_path / "images")},
        backbone={"resize": "bicubic", "normalization": "minus_one_to_one"},
        cross_validation={"scheme": "shuffled"},
        head_precision="bfloat16",
    )
    results = frame(run, "results")
    assert set(results["preprocessing"]) == {"bicubic, minus_one_to_one"}
    assert set(results["fold_scheme"]) == set(frame(run, "trials")["fold_scheme"]) == {"shuffled"}
    assert set(results["image_source"]) == {"folder"}
    assert results["test_accuracy"].min() > LEARNED


def test_shuffled_folds_hold_every_image_once_and_in_another_order(images: Path) -> None:
    config = small_config(images, ("first",), cross_validation={"scheme": "shuffled", "n_folds": 4})
    task = open_task(config, "first")
    folds = [task.fold(number) for number in range(4)]
    assert sorted(np.concatenate([validation for _, validation in folds]).tolist()) == list(range(20))
    for train, validation in folds:
        assert sorted([*train, *validation]) == list(range(20))
        assert validation.tolist() != list(range(validation[0], validation[0] + 5))


@pytest.mark.slow
def test_a_web_dataset_with_the_papers_own_folds_and_a_backbone_in_bfloat16(tmp_path: Path) -> None:
    """Folds are cut from other images than the heads are trained on: their own features, their own trials."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 12)):
        folder = tmp_path / "shards" / split
        folder.mkdir(parents=True)
        with tarfile.open(folder / "0.tar", "w") as archive:
            for number in range(count):
                members = (("png", bright_or_dark(number % 2, generator)), ("cls", str(number % 2).encode()))
                for ending, data in members:
                    member = tarfile.TarInfo(f"{number:04d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    write_task(tmp_path / "original", "first", n_train=26)
    run = run_variant(
        tmp_path,
        {"format": "webdataset", "root": str(tmp_path / "shards")},
        backbone={"precision": "bfloat16"},
        cross_validation={
            "scheme": "blocks", "images": {"format": "parquet", "root": str(tmp_path / "original" / "first")},
        },
    )  # fmt: skip
    features = frame(run, "features")
    assert features.groupby("split")["index"].nunique().to_dict() == {"folds": 26, "train": 20}
    trials = frame(run, "trials")
    assert set(trials["n_validation"]) == {13}
    assert set(trials["fold_scheme"]) == {"blocks"}
    results = frame(run, "results")
    assert set(results["n_train"]) == {20}
    assert results["test_accuracy"].min() > LEARNED


def test_folds_of_other_images_are_blocks_of_them(tmp_path: Path) -> None:
    write_task(tmp_path, "first")
    write_task(tmp_path / "original", "first", n_train=26)
    others = {"format": "parquet", "root": str(tmp_path / "original" / "first")}
    task = open_task(small_config(tmp_path, ("first",), cross_validation={"images": others}), "first")
    assert task.fold_split == "folds"
    assert task.fold(1)[1].tolist() == list(range(13, 26))
    assert artifacts.features_key(task, "folds") != artifacts.features_key(task, "train")
