"""Parquet bombs, small files of very many rows or bytes, are refused by what their metadata says."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from h2t import parquet_bounds
from h2t.errors import UserError
from h2t.images.formats import open_source
from h2t.images.unlabelled import find_images
from h2t.parquet_bounds import LARGEST_ROWS, check_expansion
from h2t.tasks import Task
from pipelines.contents import describe
from pipelines.products import is_whole
from pipelines.report.frames import read_run
from pipelines.run_directory import RunDirectory, damaged_file
from pipelines.schemas import RESULTS

TASK = Task("bomb", "Bomb", "natural", 2)


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of less than a megabyte with more rows than any that is read."""
    path = tmp_path_factory.mktemp("bomb") / "train.parquet"
    part = 2**20
    values = {"image": b"an image", "path": "image.png", "label": 0}
    table = pa.table({name: pa.repeat(pa.scalar(value), part) for name, value in values.items()})
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(LARGEST_ROWS // part + 1):
            writer.write_table(table, row_group_size=part)
    assert path.stat().st_size < 2**20
    return path


@pytest.mark.parametrize("format", ["parquet", "table"])
def test_as_images_or_a_table_of_labels(bomb: Path, format: str) -> None:
    with pytest.raises(UserError, match=r"train.parquet has 10,485,760 rows, expected at most 10,000,000"):
        open_source(format, TASK, str(bomb), {}).labels("train")


def test_as_images_to_predict(bomb: Path) -> None:
    for place in (bomb, bomb.parent):
        with pytest.raises(UserError, match=r"train.parquet has 10,485,760 rows"):
            find_images([str(place)])


def test_in_a_run_directory(bomb: Path, tmp_path: Path) -> None:
    """It is set aside as any file that is not what was written; the report names it."""
    name = "results/backbone/task/frozen/results-0123456789ab.parquet"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).symlink_to(bomb)
    run = RunDirectory(str(tmp_path))
    with pytest.raises(UserError, match="is damaged: it has 10,485,760 rows") as error:
        run.read_table([name])
    assert damaged_file(error.value) == name
    assert not is_whole(run, name)
    with pytest.raises(UserError, match=rf"{name} has 10,485,760 rows"):
        read_run(run)
    with pytest.raises(UserError, match="is damaged: it has 10,485,760 rows"):
        list(describe(str(tmp_path / name)))


def test_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, each a long list; of random numbers they are what they seem."""
    monkeypatch.setattr(parquet_bounds, "FINE_BYTES", 2**20)
    for values, refused in (
        (np.zeros(2**20, np.float32), True),
        (np.random.default_rng(0).random(2**20), False),
    ):
        rows = pa.FixedSizeListArray.from_arrays(pa.array(values), 2**18)
        pq.write_table(pa.table({"features": rows}), tmp_path / "features.parquet")
        metadata = pq.read_metadata(tmp_path / "features.parquet")
        if refused:
            with pytest.raises(
                UserError, match=r"features would take 0.0 GiB of memory for [\d,]+ bytes on disk"
            ):
                check_expansion(metadata, "features")
        else:
            check_expansion(metadata, "features")


def test_what_a_run_writes_is_far_from_it(tmp_path: Path) -> None:
    pq.write_table(RESULTS.empty_table(), tmp_path / "empty.parquet")
    check_expansion(pq.read_metadata(tmp_path / "empty.parquet"), "empty")
