"""Keys: what changes them and what never does; and that every kind of table reads anywhere."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.torch import save_file

from h2t.backbones.loading import load_backbone
from h2t.checksum import tensor_digest
from h2t.methods import METHODS
from pipelines import artifacts, products, schemas
from pipelines.config import BackboneConfig, Config, Resources, SecondBackbone, fingerprint
from pipelines.evaluate import result_product
from pipelines.run import STAGES, run_stages
from pipelines.run_directory import RunDirectory
from pipelines.task_data import open_task
from tests.pipelines.conftest import frame, output, result_rows, run_all, small_config, write_task

pytestmark = pytest.mark.usefixtures("cluster")

# Another value of every setting of how the work is cut.
OTHER_RESOURCES: dict[str, Any] = {
    "actors": 2, "gpus_per_actor": 0.0, "cpus_per_actor": 2, "gpus_per_trial": 0.0, "cpus_per_trial": 2,
    "concurrent_trials": 2, "points_per_trial": 3, "memory_per_trial_gb": 1.0, "shard_size": 7,
    "images_per_forward": 3, "compile": True, "feature_compression": "zstd", "max_failures": 5,
    "no_progress_timeout_s": 60.0,
}  # fmt: skip


def keys(config: Config) -> dict[str, list[str]]:
    """Every key of the first task, by kind."""
    task = open_task(config, "first")
    point = config.search_space("head2toe")[0]
    return {
        "features": [artifacts.features_key(task, split) for split in ("train", "test")],
        "trials": [trial.key for trial in artifacts.trials(task).trials],
        "chosen": list(artifacts.chosen_from_trials(task).units),
        "heads": list(artifacts.heads(task, [point]).units),
        "finetuning": [artifacts.finetuning(task, point, 0, fold, point).file for fold in (0, None)],
        "predictions": [artifacts.predictions(task, "frozen", ["a head"]).key],
        "results": list(result_product(task, ["a head"]).units),
        "manifests": list(artifacts.manifest(task).units),
    }


def test_every_setting_of_resources_is_tried() -> None:
    assert set(OTHER_RESOURCES) == set(Resources.model_fields)
    defaults = Resources()
    assert all(getattr(defaults, name) != value for name, value in OTHER_RESOURCES.items())


@pytest.mark.parametrize("name", list(OTHER_RESOURCES))
def test_no_setting_of_resources_changes_any_key(images: Path, name: str) -> None:
    assert keys(small_config(images, resources={name: OTHER_RESOURCES[name]})) == keys(small_config(images))


def test_another_cut_of_the_work_recomputes_nothing(
    finished: RunDirectory, images: Path, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    shutil.copytree(finished.uri, run.uri)
    kinds = ("features", "trials", "chosen", "heads", "predictions", "results", "kept")

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for kind in kinds for path in Path(run.uri, kind).rglob("*.*")}

    before = times()
    cut = {name: OTHER_RESOURCES[name] for name in ("shard_size", "images_per_forward", "points_per_trial")}
    run_all(small_config(images, resources=cut), run)
    assert times() == before
    assert not Path(run.uri, "superseded").exists()


def test_what_is_read_within_a_depth_is_other(images: Path) -> None:
    usual = keys(small_config(images, methods=["head2toe"]))
    early = keys(small_config(images, methods=["head2toe"], backbone={"max_depth": 0.5}))
    assert not any(early[kind] == usual[kind] for kind in early)
    assert keys(small_config(images, methods=["head2toe"], backbone={"max_depth": None})) == usual


def test_strict_results_are_others(images: Path) -> None:
    strict, usual = keys(small_config(images, deterministic="strict")), keys(small_config(images))
    assert not any(strict[kind] == usual[kind] for kind in strict)


@pytest.mark.parametrize("setting", [{"tokens": "grid"}, {"pooling": "average_max"}, {"pooling": "pyramid"}])
def test_another_aggregation_changes_every_key(images: Path, setting: dict[str, str]) -> None:
    other, usual = keys(small_config(images, backbone=setting)), keys(small_config(images))
    assert all(set(other[kind]).isdisjoint(usual[kind]) for kind in usual)


def test_a_backbone_of_before_has_the_keys_of_before() -> None:
    # As they were when recipes had neither tokens nor pooling.
    assert fingerprint(BackboneConfig(name="resnet50")) == "2be4d023ed11"
    pair = BackboneConfig(name="vitb16", cls_token="nopool_cls", second=SecondBackbone(name="resnet50"))
    assert fingerprint(pair) == "3e7468ead6cb"
    assert pair.model_dump().keys().isdisjoint({"tokens", "pooling", "max_depth"})
    assert BackboneConfig(name="vitb16", tokens="grid").model_dump()["tokens"] == "grid"


def test_moved_images_and_weights_keep_every_key(images: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    model = load_backbone("test_efficientnet", weights="random", image_size=32, seed=3).model
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    before = keys(small_config(images, backbone={"weights": str(weights)}))
    shutil.copytree(images, tmp_path / "mounted elsewhere")
    (tmp_path / "elsewhere").mkdir()
    moved = weights.rename(tmp_path / "elsewhere" / "renamed.safetensors")
    config = small_config(tmp_path / "mounted elsewhere", backbone={"weights": str(moved)})
    assert keys(config) == before
    assert keys(small_config(images)) != before


def test_another_image_under_the_same_name_changes_every_key(images: Path, tmp_path: Path) -> None:
    write_task(tmp_path, "first")
    same = keys(small_config(tmp_path, ("first",)))
    assert same == keys(small_config(images))
    write_task(tmp_path, "first", seed=9)
    other = keys(small_config(tmp_path, ("first",)))
    assert all(set(other[kind]).isdisjoint(same[kind]) for kind in same)


def test_other_test_images_change_predictions_and_results_alone(images: Path, tmp_path: Path) -> None:
    before = keys(small_config(images))
    shutil.copytree(images / "first", tmp_path / "first")
    write_task(tmp_path / "other", "first", seed=9)
    (tmp_path / "other" / "first" / "test.parquet").replace(tmp_path / "first" / "test.parquet")
    after = keys(small_config(tmp_path, ("first",)))
    train, test = after.pop("features")
    assert [train == before["features"][0], test == before.pop("features")[1]] == [True, False]
    assert {kind for kind in after if after[kind] != before[kind]} == {"predictions", "results"}


def test_an_image_that_is_left_out_is_listed_once_whatever_reads_it(images: Path) -> None:
    """By the heads, by other heads, and by fine-tuned models."""
    task = open_task(small_config(images), "first")
    tables = [artifacts.predictions(task, "frozen", [name]) for name in ("a head", "another")]
    tables.append(artifacts.predictions(task, "finetuned", ["a model"]))
    cut = [products.shards(table.missing(RunDirectory("unused"), []), 100)[0] for table in tables]
    assert len({shard.files for shard in cut}) == 3
    assert len({artifacts.bad_rows_file(task, shard) for shard in cut}) == 1


def test_another_version_of_the_heads_keeps_the_features(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(small_config(images))
    monkeypatch.setattr(artifacts, "HEADS_VERSION", artifacts.HEADS_VERSION + 1)
    after = keys(small_config(images))
    assert after["features"] == before["features"]
    assert after["manifests"] == before["manifests"]
    for kind in ("trials", "chosen", "heads"):
        assert set(after[kind]).isdisjoint(before[kind])


def test_another_definition_of_a_method_makes_its_heads_anew(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    before = {
        trial.point: trial.key for trial in artifacts.trials(open_task(small_config(images), "first")).trials
    }
    monkeypatch.setitem(METHODS, "head2toe", replace(METHODS["head2toe"], regularizer="l1"))
    after = {
        trial.point: trial.key for trial in artifacts.trials(open_task(small_config(images), "first")).trials
    }
    changed = {point.method for point in before if before[point] != after[point]}
    assert changed == {"head2toe"}


def test_a_changed_grid_trains_only_what_is_new(finished: RunDirectory, images: Path, tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    shutil.copytree(finished.uri, run.uri)
    before = frame(run, "trials")
    run_stages(small_config(images, grid={"steps": [5, 10, 12]}), run.uri, ["sweep"], Console(quiet=True))
    after = frame(run, "trials")
    assert set(before["trial"]) < set(after["trial"])
    assert set(after.loc[~after["trial"].isin(before["trial"]), "steps"]) == {12}
    assert not after["trial"].duplicated().any()


KINDS = ("results", "trials", "chosen", "kept", "predictions", "features/test_efficientnet/target-size-16")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tool_reads_every_kind_of_table_with_default_options(finished: RunDirectory, kind: str) -> None:
    folder = f"{finished.uri}/{kind}"
    files = [str(path) for path in Path(folder).rglob("*.parquet")]
    n_rows = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
    read = {
        "pandas": pd.read_parquet(folder),
        "pyarrow": pq.read_table(folder).to_pandas(),
        "dataset": pyarrow.dataset.dataset(folder).to_table().to_pandas(),
        "polars folder": polars.read_parquet(folder).to_pandas(),
        "polars pattern": polars.read_parquet(f"{folder}/**/*.parquet").to_pandas(),
        "duckdb": duckdb.sql(f"SELECT * FROM '{folder}/**/*.parquet'").df(),
    }
    for tool, rows in read.items():
        assert len(rows) == n_rows > 0, tool
        assert set(rows["task"]) == {"first", "second"}, tool
        assert set(rows["backbone"]) == {"test_efficientnet"}, tool
        assert str(rows["task"].dtype) in ("object", "str", "string"), tool


@pytest.mark.parametrize("name", ["007", "2024-01-01", "1e3"])
def test_names_like_numbers_and_dates_stay_text_in_every_tool(tmp_path: Path, name: str) -> None:
    run = RunDirectory(str(tmp_path))
    row = {"backbone": name, "task": name, "method": "linear", "test_accuracy": 0.5}
    artifacts.write_rows(run, f"results/{name}/{name}/frozen/results-0.parquet", schemas.RESULTS, [row])
    folder = f"{run.uri}/results"
    for rows in (
        pd.read_parquet(folder),
        pq.read_table(folder).to_pandas(),
        polars.read_parquet(f"{folder}/**/*.parquet").to_pandas(),
        duckdb.sql(f"SELECT * FROM '{folder}/**/*.parquet'").df(),
    ):
        assert rows[["backbone", "task"]].to_numpy().tolist() == [[name, name]]


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("results", schemas.RESULTS), ("trials", schemas.TRIALS), ("chosen", schemas.CHOSEN),
        ("kept", schemas.KEPT), ("predictions", schemas.PREDICTIONS),
    ],
)  # fmt: skip
def test_tables_have_the_declared_columns(finished: RunDirectory, kind: str, schema: Any) -> None:
    for path in Path(finished.uri, kind).rglob("*.parquet"):
        assert pq.read_schema(path).remove_metadata().equals(schema)


def test_names_of_folders_say_nothing_that_readers_take_for_columns(finished: RunDirectory) -> None:
    assert not [path for path in Path(finished.uri).rglob("*") if "=" in path.name]


RARELY = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("trials", "predictions", "results")]


@pytest.mark.parametrize("kind", ["features", "heads", "manifests", *RARELY])
def test_a_damaged_file_is_set_aside_said_and_made_again(
    finished: RunDirectory, images: Path, tmp_path: Path, console: Console, kind: str
) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    shutil.copytree(finished.uri, run.uri)
    victim = next(path for path in sorted(Path(run.uri, kind).rglob("*")) if path.is_file())
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    run_stages(small_config(images), run.uri, list(STAGES), console)
    name = str(victim.relative_to(run.uri))
    assert f"{name} is damaged" in " ".join(output(console).split())
    assert (Path(run.uri) / "damaged" / name).exists()
    same = tensor_digest if kind == "heads" else len  # whose metadata has times, and is deflated
    assert same(victim.read_bytes()) == same((Path(finished.uri) / name).read_bytes())


def one_row_short(path: Path, others: list[Path]) -> None:
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 1), path)


def no_rows(path: Path, others: list[Path]) -> None:
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def copied_over(path: Path, others: list[Path]) -> None:
    shutil.copy(next(other for other in others if other != path), path)


def another_label(path: Path, others: list[Path]) -> None:
    table = pq.read_table(path)
    labels = np.full(len(table), 99)
    position = table.schema.get_field_index("label")
    field = table.schema.field(position)
    pq.write_table(table.set_column(position, field, pa.array(labels, field.type)), path)


def flipped_bytes(path: Path, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2  # among the values, not in the footer or the header
    for position in range(middle, middle + 4):
        data[position] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [one_row_short, copied_over, another_label, no_rows])
@pytest.mark.parametrize("kind", ["features", "predictions"])
def test_rows_that_cannot_be_are_known_by_their_keys(
    finished: RunDirectory, images: Path, tmp_path: Path, kind: str, damage: Any
) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    shutil.copytree(Path(finished.uri, kind), Path(run.uri, kind))
    task = open_task(small_config(images), "first")
    (folder,) = {str(Path(name).parent) for name in run.names(kind, recursive=True) if "/first/" in name
                 and "target-size-64" not in name}  # fmt: skip
    files = sorted(Path(run.uri, folder).iterdir())
    key = files[0].stem.rpartition("-")[2]
    split = "train" if kind == "features" else "test"
    product = products.RowFiles(folder, key, "first", split, 20, 0, "", task.labels[split])
    names = run.names(folder)
    assert all(product.is_whole(run, name) for name in names)
    damage(files[0], files)
    assert [product.is_whole(run, name) for name in names] == [False, *(True for _ in names[1:])]


def test_rows_that_are_left_out_as_bad_are_not_missing(tmp_path: Path) -> None:
    run, labels = RunDirectory(str(tmp_path)), np.arange(10, dtype=np.int32)
    product = products.RowFiles("f", "k", "t", "train", 10, 0, "", labels, "bad_rows/b/t/train")
    table = pa.table({"index": pa.array([0, 1, 3], pa.int32()), "label": pa.array([0, 1, 3], pa.int32())})
    run.write_table(product.name(0, 4), table)
    assert not product.is_whole(run, product.name(0, 4))
    run.write_table("bad_rows/b/t/train-000000-000004-0123456789ab.parquet", pa.table({"index": [2]}))
    assert product.is_whole(run, product.name(0, 4))


DAMAGES = [
    *[(kind, damage) for kind in ("features", "predictions")
      for damage in (one_row_short, copied_over, another_label, flipped_bytes)],
    ("trials", no_rows), ("trials", flipped_bytes), ("heads", flipped_bytes), ("results", flipped_bytes),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "damage"), DAMAGES)
def test_other_content_never_gives_other_numbers(
    finished: RunDirectory, images: Path, tmp_path: Path, console: Console, kind: str, damage: Any
) -> None:
    """Whatever rests on a damaged file is asked for: it must be made again, and be what it was."""
    run = RunDirectory(str(tmp_path / "run"))
    shutil.copytree(finished.uri, run.uri)
    files = sorted(
        path for path in Path(run.uri, kind).rglob("*") if path.is_file() and "first" in path.parts
    )
    victim = files[1 if kind == "features" else 0]
    before = pq.read_table(victim) if victim.suffix == ".parquet" else victim.read_bytes()
    damage(victim, files)
    for folder in RESTS_ON[kind]:
        shutil.rmtree(Path(run.uri, folder))
    run_stages(small_config(images), run.uri, list(STAGES), console)
    name = str(victim.relative_to(run.uri))
    said = "".join(output(console).split())
    assert f"{name}isdamaged" in said or (kind == "trials" and damage is no_rows)
    assert any((Path(run.uri) / folder / name).exists() for folder in ("damaged", "superseded"))
    after = pq.read_table(victim) if victim.suffix == ".parquet" else victim.read_bytes()
    if kind in ("features", "predictions"):
        assert after.equals(before)
    pd.testing.assert_frame_equal(result_rows(run), result_rows(finished))


RESTS_ON = {
    "features": ("trials", "chosen", "heads", "predictions", "results"),
    "trials": ("chosen", "results"),
    "heads": ("predictions", "results"),
    "predictions": ("results",),
    "results": (),
}
