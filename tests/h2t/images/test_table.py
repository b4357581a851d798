"""Tables of image files and labels."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from h2t.errors import UserError
from h2t.images.formats import open_source
from h2t.images.preprocessing import decode
from h2t.images.source import SourceUnavailable, check_rows
from h2t.tasks import Task

TASK = Task("birds", "Birds", "other", 0, n_train=0)
NAMES = ["owl", "wren", "crow"]


@pytest.fixture
def photos(tmp_path: Path, encode) -> Path:
    """Twelve images of a brightness of their own."""
    (tmp_path / "photos").mkdir()
    for number in range(12):
        (tmp_path / "photos" / f"{number}.png").write_bytes(encode(np.full((2, 2, 3), number, np.uint8)))
    return tmp_path


def table(**columns: object) -> pd.DataFrame:
    paths = [f"photos/{number}.png" for number in range(12)]
    return pd.DataFrame({"path": paths, "label": [NAMES[number % 3] for number in range(12)]} | columns)


def pairs(source, split) -> dict[int, int]:
    """Brightness -> label."""
    labels = source.labels(split)
    values = [int(decode(image)[0, 0, 0]) for image in source.read(split, range(len(labels)))]
    return dict(zip(values, labels.tolist(), strict=True))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_names_and_a_share_for_testing(photos: Path, ending: str) -> None:
    path = photos / f"birds.{ending}"
    getattr(table(), f"to_{ending}")(path, index=False)
    source = open_source("table", TASK, str(path), {"test_fraction": 0.25})
    assert source.class_names() == ("crow", "owl", "wren")
    train, test = pairs(source, "train"), pairs(source, "test")
    assert len(test) == 3
    assert train | test == {number: [1, 2, 0][number % 3] for number in range(12)}
    assert source.provenance()["rows"] == "0.25 for testing, seed 0"
    assert not check_rows(source, TASK, "train")


def test_a_column_of_splits_numbers_and_other_names_of_columns(photos: Path) -> None:
    path = photos / "birds.csv"
    rows = table(split=["train"] * 8 + ["val"] * 4, cls=[number % 2 for number in range(12)])
    rows.rename(columns={"path": "where"}).to_csv(path, index=False)
    options = {"image": "where", "label": "cls", "test": "val"}
    source = open_source("table", TASK, str(path), options)
    assert source.class_names() == ()
    assert pairs(source, "train") == {number: number % 2 for number in range(8)}
    assert pairs(source, "test") == {number: number % 2 for number in range(8, 12)}
    with pytest.raises(UserError, match=r"unknown split of .* 'test'.* expected one of train, val"):
        open_source("table", TASK, str(path), options | {"test": "test"}).labels("test")


def test_other_images_or_labels_are_another_identity(photos: Path) -> None:
    def identity() -> str:
        return open_source("table", TASK, str(photos / "birds.csv"), {}).identity("train")

    table().to_csv(photos / "birds.csv", index=False)
    first = identity()
    assert identity() == first
    table(label=["owl"] * 6 + ["wren"] * 6).to_csv(photos / "birds.csv", index=False)
    assert identity() != first


def test_rows_without_file_or_label_are_told(photos: Path) -> None:
    rows = table(split=["train"] * 12)
    rows.loc[3, "label"] = None
    rows.loc[5, "path"] = "photos/gone.png"
    rows.to_csv(photos / "birds.csv", index=False)
    source = open_source("table", TASK, str(photos / "birds.csv"), {})
    bad = {Path(row.path).name: row.reason for row in check_rows(source, TASK, "train")}
    assert set(bad) == {"3.png", "gone.png"}
    assert "no label" in bad["3.png"]
    assert "not there" in bad["gone.png"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a,b\n1,2\n", {}, "has the columns a, b: expected one of path"),
        ("path,label\nx.png,0.5\n", {}, "'label' of .* is double: expected whole numbers or names"),
        ("path,label\nx.png,1\n", {"label": "lable"}, "unknown column of .* 'lable': did you mean label"),
        ("path,label\nx.png,1,2\n", {}, "cannot be read as a table"),
        ("path,label\nx.png,1\n", {"test_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, content: str, options: dict, message: str) -> None:
    (tmp_path / "birds.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        open_source("table", TASK, str(tmp_path / "birds.csv"), options)


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match=r"is a folder, expected a \.csv"):
        open_source("table", TASK, str(tmp_path), {})
