"""From a folder of images to an adapter, predictions in a fresh process, and ONNX."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from h2t.adapter import Adapter
from h2t.backbones.loading import load_backbone
from h2t.costs import within_depth
from h2t.errors import UserError
from h2t.images.preprocessing import decode
from h2t.images.source import EncodedImage
from pipelines import predict_many
from pipelines.cluster import Cluster
from pipelines.fit import format_of
from pipelines.recipe import parse_config
from pipelines.run_directory import RunDirectory
from pipelines.run_record import read_record
from pipelines.task_data import open_task
from tests.pipelines.conftest import invoke, png

SETTINGS = (
    "backbone.weights=random", "grid.steps=[20]", "grid.learning_rate=[0.1]",
    "grid.keep_fraction=[0.05, 0.2]", "grid.target_size=[32]", "grid.head2toe_coefficient=[0.00001]",
    "cross_validation.n_folds=2",
    "resources.concurrent_trials=1", "resources.actors=1",
)  # fmt: skip
COLOURS = {"ant": (200, 60, 40), "bee": (60, 60, 200), "cat": (90, 180, 90)}


@pytest.fixture(scope="module")
def leaves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of fifteen images each, of several sizes, that overlap a little; and a file beside."""
    root, random = tmp_path_factory.mktemp("own") / "leaves", np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(15):
            side = int(random.integers(30, 60))
            noise = random.normal(0, 70, (side, side + 9, 3))
            pixels = np.clip(np.array(colour) + noise + random.normal(0, 60, 3), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def fitted(leaves: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a fit left its adapter, ``leaf.safetensors``, and its run."""
    folder = tmp_path_factory.mktemp("fit")
    settings = [argument for setting in SETTINGS for argument in ("--set", setting)]
    status, shown = invoke(
        "fit", str(leaves), "--backbone", "test_resnet", "--image-size", "48",
        "--out", str(folder / "leaf.safetensors"), "--run-dir", str(folder / "run"), *settings,
    )  # fmt: skip
    assert status == 0, shown
    (folder / "shown.txt").write_text(shown)
    return folder


def held_out(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The predictions of the run for its held-out images by the method that was saved, and their files."""
    run = RunDirectory(str(folder / "run"))
    chosen = Adapter.load(folder / "leaf.safetensors").head.hyperparameters.method  # type: ignore[union-attr]
    rows = run.read_table(run.names("predictions", recursive=True)).to_pandas()
    rows = rows[rows["method"] == chosen].sort_values("index")
    task = open_task(parse_config(read_record(run)["config"], "run"), "leaves")
    source, _ = task.sources["test"]
    return rows, [source.name("test", index) for index in rows["index"]]


def test_fit_predict_and_onnx_agree_to_the_image(fitted: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    rows, files = held_out(fitted)
    assert len(files) == 9
    shown = (fitted / "shown.txt").read_text()
    right = (rows["prediction"] == rows["label"]).to_numpy()
    assert f"{100 * right.mean():.1f}" in shown
    assert right.mean() > 0.4
    command = [sys.executable, "-m", "pipelines", "predict", "leaf.safetensors", *files, "--out", "p.parquet"]
    root = Path(__file__).parents[2]
    subprocess.run(command, cwd=fitted, check=True, env=os.environ | {"PYTHONPATH": str(root)})
    predicted = pd.read_parquet(fitted / "p.parquet")
    assert predicted["image"].tolist() == files
    names = np.array(list(COLOURS))
    np.testing.assert_array_equal(predicted["label"], names[rows["prediction"]])
    assert invoke("export", str(fitted / "leaf.safetensors"), str(fitted / "leaf.onnx"))[0] == 0
    session = onnxruntime.InferenceSession(fitted / "leaf.onnx")
    assert session.get_modelmeta().custom_metadata_map["classes"] == '["ant", "bee", "cat"]'
    for file, prediction in zip(files, rows["prediction"], strict=True):
        pixels = decode(EncodedImage(Path(file).read_bytes(), file))[None].transpose(0, 3, 1, 2)
        (logits,) = session.run(None, {"pixels": pixels.astype(np.float32)})
        assert logits.argmax() == prediction


def test_fit_says_what_it_found_and_writes_a_card(fitted: Path) -> None:
    shown, card = (fitted / "shown.txt").read_text(), (fitted / "leaf.md").read_text()
    for words in ("linear", "head2toe", "held-out accuracy", "on 9 held-out images", "h2t predict"):
        assert words in " ".join(shown.split())
    for words in ("frozen `test_resnet`, for 3 classes: ant, bee, cat", "9 images", "training images | 36"):
        assert words in card
    assert "notes.txt" in "".join(shown.split())


@pytest.mark.slow
def test_fit_within_a_depth_reads_no_later_tap(
    leaves: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [argument for setting in SETTINGS for argument in ("--set", setting)]
    status, shown = invoke(
        "fit", str(leaves), "--backbone", "test_resnet", "--image-size", "48", "--max-depth", "0.5", *settings
    )
    assert status == 0, shown
    assert "linear" not in shown
    whole = load_backbone("test_resnet", weights="random", image_size=48)
    adapter = Adapter.load("leaves.safetensors")
    assert adapter.backbone.taps == within_depth(whole, 0.5).taps
    assert adapter.head.layout.taps == tuple(tap.name for tap in adapter.backbone.taps)  # type: ignore[union-attr]
    assert "ends within 50% of its multiply-adds" in Path("leaves.md").read_text()
    stored = pq.ParquetFile(next(Path("runs/fit-leaves/features").rglob("*.parquet"))).schema_arrow.names
    assert not {tap.name for tap in whole.taps if tap not in adapter.backbone.taps} & set(stored)


def test_fit_goes_on_where_it_stopped(fitted: Path, leaves: Path) -> None:
    settings = [argument for setting in SETTINGS for argument in ("--set", setting)]
    status, shown = invoke(
        "fit", str(leaves), "--backbone", "test_resnet", "--image-size", "48",
        "--out", str(fitted / "again.safetensors"), "--run-dir", str(fitted / "run"), *settings,
    )  # fmt: skip
    assert status == 0
    assert shown.count("nothing to do") >= 3
    assert (fitted / "again.safetensors").read_bytes() == (fitted / "leaf.safetensors").read_bytes()


def test_predict_takes_folders_patterns_and_parquet_and_names_what_cannot_be_read(
    fitted: Path, leaves: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"junk")
    files = sorted((leaves / "ant").glob("*.png"))
    columns = {"image": [file.read_bytes() for file in files[:3]]}
    pq.write_table(pa.table(columns), tmp_path / "some.parquet")
    adapter = str(fitted / "leaf.safetensors")
    whole = tmp_path / "whole.csv"
    places = [
        str(leaves / "ant"),
        f"{leaves}/bee/1*.png",
        str(tmp_path / "some.parquet"),
        str(tmp_path / "bad.png"),
    ]
    options = ("--out", str(whole), "--top", "2", "--batch-size", "4")
    status, shown = invoke("predict", adapter, *places, *options)
    assert status == 1
    assert "bad.png: not an image" in shown
    rows = pd.read_csv(whole)
    assert list(rows.columns) == ["image", "adapter", "label", "probability", "label_2", "probability_2"]
    assert len(rows) == 15 + 6 + 3
    assert rows["label"].tolist()[:3] == rows["label"].tolist()[-3:]
    assert (rows["probability"] >= rows["probability_2"]).all()
    expected = Adapter.load(adapter).predict([str(file) for file in files])
    by_name = rows.set_index("image")["label"]
    assert [by_name[str(file)] for file in files] == expected.labels.tolist()


def test_adapters_of_one_backbone_share_its_passes(fitted: Path, leaves: Path, tmp_path: Path) -> None:
    one, two = fitted / "leaf.safetensors", tmp_path / "small.safetensors"
    assert invoke("export", str(one), str(two), "--weights", "float16")[0] == 0
    out = tmp_path / "both.parquet"
    assert invoke("predict", str(one), str(two), str(leaves), "--out", str(out))[0] == 0
    rows = pd.read_parquet(out)
    first, second = (rows[rows["adapter"] == name].set_index("image") for name in ("leaf", "small"))
    assert len(first) == len(second) == 45
    np.testing.assert_allclose(first["probability"], second["probability"], atol=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{adapter}"], "got 1 adapters and 0 places with images"),
        (["predict", "{adapter}", "nowhere"], "there is nothing at 'nowhere'"),
        (["predict", "{adapter}", "{empty}"], "no images in"),
        (["predict", "{adapter}", "{empty}/*.png"], "nothing fits"),
        (
            ["predict", "{adapter}", "{leaves}", "--out", "p.txt"],
            "expected a name that ends with .parquet or .csv",
        ),
        (["predict", "{broken}", "{leaves}"], "is not a head or model saved by this package, or is damaged"),
        (["predict", "{broken}", "{leaves}", "--out", "many/"], "saved by this package, or is damaged"),
        (["fit", "{empty}"], "no folders of classes with images"),
        (["fit", "{leaves}", "--backbone", "resnet51"], "unknown"),
        (["fit", "{leaves}", "--weights", "int4"], "unknown type of weights 'int4'"),
        (["fit", "{leaves}", "--out", "leaf.bin"], "expected a name that ends with .safetensors"),
        (["fit", "{leaves}", "--format", "bundled"], "--format: expected one of"),
        (["fit", "{leaves}", "--max-depth", "2"], "backbone.max_depth: expected a number less than or equal"),
        (["export", "{adapter}", "leaf.pt"], "expected a name that ends with .onnx or .safetensors"),
        (["inspect", "nothing.safetensors"], "there is no file at 'nothing.safetensors'"),
        (["inspect", "{leaves}"], "neither a run directory nor"),
    ],
)
def test_mistakes_are_one_message(
    fitted: Path,
    leaves: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes((fitted / "leaf.safetensors").read_bytes()[:-9])
    places = {
        "adapter": fitted / "leaf.safetensors",
        "leaves": leaves,
        "empty": tmp_path / "empty",
        "broken": tmp_path / "broken.safetensors",
    }
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        invoke(*(argument.format_map(places) for argument in arguments))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (
            "leaf.safetensors",
            ["a head on a frozen backbone", "ant, bee, cat", "test_resnet", "SHA-256 of tensors"],
        ),
        ("run", ["fit-leaves", "rows of results", "linear, head2toe", "trials/"]),
        ("features", ["features of frozen taps: 36 rows", "taps of", "leaves"]),
        ("results", ["rows of a table: 2 rows", "head2toe (1), linear (1)", "test_accuracy"]),
    ],
)
def test_inspect_says_what_is_inside(fitted: Path, place: str, words: list[str]) -> None:
    path = fitted / place
    if not path.exists():
        path = next((fitted / "run" / place).rglob("*.parquet"))
    status, shown = invoke("inspect", str(path))
    assert status == 0
    for word in words:
        assert word in " ".join(shown.split()), shown


def test_an_image_of_a_parquet_file_may_lie_beside_it(fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(np.zeros((20, 20, 3), np.uint8)))
    rows = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "gone.png"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "rows.parquet")
    out = tmp_path / "out.parquet"
    adapter = str(fitted / "leaf.safetensors")
    assert invoke("predict", adapter, str(tmp_path / "rows.parquet"), "--out", str(out))[0] == 1
    assert len(pd.read_parquet(out)) == 1


@pytest.mark.parametrize(
    ("files", "format"),
    [
        (["a/1.png", "b/2.png"], "folder"),
        (["train/x.tar"], "webdataset"),
        (["train.parquet", "test.parquet"], "parquet"),
        (["labels.csv"], "table"),
        (["paths.parquet"], "table"),
    ],
)
def test_the_format_is_known_by_the_files(tmp_path: Path, files: list[str], format: str) -> None:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name == "paths.parquet":
            pq.write_table(pa.table({"path": ["a.png"], "label": [0]}), path)
        else:
            path.write_bytes(b"")
    one = len(files) == 1 and format == "table"
    assert format_of(str(tmp_path / files[0]) if one else str(tmp_path)) == format


@pytest.mark.slow
def test_a_class_with_one_image_takes_part(leaves: Path, cluster: Cluster, tmp_path: Path) -> None:
    """It cannot be held out, and no fold can both train on it and be tested with it."""
    rows = [(str(file), file.parent.name) for file in sorted(leaves.glob("*/*.png"))]
    rows.append((str(leaves / "ant" / "0.png"), "dodo"))
    pd.DataFrame(rows, columns=["path", "label"]).to_csv(tmp_path / "own.csv", index=False)
    settings = [argument for setting in SETTINGS for argument in ("--set", setting)]
    status, shown = invoke(
        "fit", str(tmp_path / "own.csv"), "--backbone", "test_resnet", "--image-size", "48",
        "--out", str(tmp_path / "own.safetensors"), "--run-dir", str(tmp_path / "run"), *settings,
    )  # fmt: skip
    assert status == 0
    assert Adapter.load(tmp_path / "own.safetensors").classes.tolist() == ["ant", "bee", "cat", "dodo"]
    words = " ".join(shown.split())
    assert "dodo has 1 image to train on: no fold can train on it and be tested with it" in words
    assert "dodo has no held-out image" in words


@pytest.mark.slow
def test_many_images_are_predicted_part_by_part_and_a_stopped_run_goes_on(
    fitted: Path, leaves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.png").write_bytes(b"junk")
    columns = {"image": [file.read_bytes() for file in sorted((leaves / "ant").glob("*.png"))[:3]]}
    pq.write_table(pa.table(columns), tmp_path / "some.parquet")
    monkeypatch.setattr(predict_many, "PART", 20)
    monkeypatch.setattr(predict_many.parts, "__defaults__", (20,))
    adapter, places = str(fitted / "leaf.safetensors"), [str(leaves), str(tmp_path)]
    one, many = tmp_path / "out" / "one.parquet", tmp_path / "out" / "many"
    one.parent.mkdir()
    assert invoke("predict", adapter, *places, "--out", str(one))[0] == 1
    status, shown = invoke("predict", adapter, *places, "--out", f"{many}/")
    assert status == 1
    assert "bad.png: not an image" in shown
    expected = pd.read_parquet(one)
    rows = pd.read_parquet(many)
    files = sorted(many.glob("*.parquet"))
    assert len(files) == 5  # 45 images in three parts, the unreadable one, and the Parquet file
    pd.testing.assert_frame_equal(rows, expected)
    before = {file: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    assert invoke("predict", adapter, *places, "--out", f"{many}/")[0] == 1
    after = {file: file.stat().st_mtime_ns for file in sorted(many.glob("*.parquet"))}
    assert {file for file in after if after[file] != before[file]} == {files[1]}
    pd.testing.assert_frame_equal(pd.read_parquet(many), expected)
