"""Data sets as ``save_to_disk`` of the library ``datasets`` leaves them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from h2t.errors import UserError
from h2t.images.formats import open_source
from h2t.images.preprocessing import decode
from h2t.images.source import SourceUnavailable, check_rows
from h2t.tasks import Task

TASK = Task("birds", "Birds", "other", 0, n_train=0)
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["crow", "owl"], "_type": "ClassLabel"}}


@pytest.fixture
def saved(tmp_path: Path, encode):
    """Writes images of a brightness of their own, label by parity, in files of at most five rows."""

    def write(folder: str, numbers: range, indices: list[int] | None = None) -> Path:
        path = tmp_path / "saved" / folder
        path.mkdir(parents=True, exist_ok=True)
        images = [{"bytes": encode(np.full((2, 2, 3), number, np.uint8)), "path": None} for number in numbers]
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table(
            {"image": pa.array(images, struct), "label": [number % 2 for number in numbers]},
            metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
        )
        names = []
        for start in range(0, len(table), 5):
            names.append(f"data-{start}.arrow")
            _write(path / names[-1], table.slice(start, 5))
        state = {"_data_files": [{"filename": name} for name in names], "_indices_files": None}
        if indices is not None:
            _write(path / "indices.arrow", pa.table({"indices": pa.array(indices, pa.uint64())}))
            state["_indices_files"] = [{"filename": "indices.arrow"}]
        (path / "state.json").write_text(json.dumps(state))
        return tmp_path / "saved"

    return write


def _write(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def values(source, split) -> list[int]:
    labels = source.labels(split)
    found = [int(decode(image)[0, 0, 0]) for image in source.read(split, range(len(labels)))]
    assert [number % 2 for number in found] == labels.tolist()
    return found


def test_splits_names_and_a_saved_selection(saved) -> None:
    root = saved("train", range(12))
    saved("val", range(20, 28), indices=[6, 1, 3])
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "val"]}))
    source = open_source("huggingface", TASK, str(root), {"test": "val"})
    assert sorted(values(source, "train")) == list(range(12))
    assert sorted(values(source, "test")) == [21, 23, 26]
    assert source.class_names() == ("crow", "owl")
    assert source.provenance()["rows"] == "train/ and val/"
    assert not check_rows(source, TASK, "train")
    assert pickle.loads(pickle.dumps(source)).labels("train").tolist() == source.labels("train").tolist()  # noqa: S301
    with pytest.raises(UserError, match=r"unknown split of .* 'test'.*expected one of train, val"):
        open_source("huggingface", TASK, str(root), {}).labels("test")


def test_one_data_set_is_cut_and_its_content_is_its_identity(saved) -> None:
    root = saved("", range(20))
    source = open_source("huggingface", TASK, str(root), {"test_fraction": 0.3})
    train, test = values(source, "train"), values(source, "test")
    assert len(test) == 6
    assert sorted(train + test) == list(range(20))
    before = source.identity("train")
    assert open_source("huggingface", TASK, str(root), {"test_fraction": 0.3}).identity("train") == before
    saved("", range(1, 21))
    assert open_source("huggingface", TASK, str(root), {"test_fraction": 0.3}).identity("train") != before


def test_other_folders_and_damaged_ones(saved, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceUnavailable, match=r"no state\.json or dataset_dict\.json in .*save_to_disk"):
        open_source("huggingface", TASK, str(tmp_path / "empty"), {})
    root = saved("", range(20))
    with pytest.raises(UserError, match=r"unknown column of .* 'lable': did you mean label"):
        open_source("huggingface", TASK, str(root), {"label": "lable"})
    (root / "data-5.arrow").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"data-5\.arrow cannot be read as Arrow"):
        open_source("huggingface", TASK, str(root), {})
    (root / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json is not there or damaged"):
        open_source("huggingface", TASK, str(root), {})
