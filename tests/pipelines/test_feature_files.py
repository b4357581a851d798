"""Feature files: what is written in batches and shards comes back as one matrix, sorted by index."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow.parquet as pq
import pytest
import torch

from h2t.errors import UserError
from h2t.features import FeatureLayout
from h2t.precision import StoredPrecision
from pipelines.feature_files import Compression, FeatureTable, read_features, write_features
from pipelines.run_directory import RunDirectory

LAYOUT = FeatureLayout(("a", "a.b", "c"), (3, 1, 4))  # the names of modules nest


def table_of(layout: FeatureLayout, precision: StoredPrecision = "float32") -> FeatureTable:
    return FeatureTable("backbone", "task", "train", 16, layout, layout.taps[-1], precision)


def write(
    run: RunDirectory,
    name: str,
    index: np.ndarray,
    matrix: np.ndarray,
    layout: FeatureLayout = LAYOUT,
    compression: Compression = "none",
    precision: StoredPrecision = "float32",
) -> None:
    batches = [
        {16: [torch.from_numpy(np.ascontiguousarray(matrix[rows][:, span])) for span in layout.slices]}
        for rows in np.array_split(index, 3)
    ]
    write_features(run, {name: table_of(layout, precision)}, index, index % 5, batches, compression)


@pytest.mark.parametrize("precision", get_args(StoredPrecision))
@pytest.mark.parametrize("compression", get_args(Compression))
def test_rows_come_back_sorted_whatever_their_order(
    tmp_path: Path, compression: Compression, precision: StoredPrecision
) -> None:
    run, generator = RunDirectory(str(tmp_path)), np.random.default_rng(0)
    matrix = generator.standard_normal((20, LAYOUT.n_features)).astype(precision).astype(np.float32)
    shuffled = generator.permutation(20)
    parts = {"sorted": np.arange(20), "mixed": shuffled}
    for name, index in parts.items():
        for number, rows in enumerate(np.array_split(index, 2)):
            write(run, f"{name}-{number}.parquet", rows, matrix, LAYOUT, compression, precision)
        read = read_features(run, [f"{name}-0.parquet", f"{name}-1.parquet"])
        np.testing.assert_array_equal(read.values, matrix)
        np.testing.assert_array_equal(read.index, np.arange(20))
        np.testing.assert_array_equal(read.labels, np.arange(20) % 5)
        assert read.layout == LAYOUT
        assert (read.embedding, read.values.dtype) == ("c", np.dtype(precision))


@pytest.mark.parametrize("compression", get_args(Compression))
def test_half_precision_takes_half_the_bytes_and_other_readers_know_it(
    tmp_path: Path, compression: Compression
) -> None:
    run, layout = RunDirectory(str(tmp_path)), FeatureLayout(("a", "b"), (1000, 3))
    matrix = np.random.default_rng(0).standard_normal((40, layout.n_features)).astype(np.float32)
    for precision in get_args(StoredPrecision):
        write(run, f"{precision}.parquet", np.arange(40), matrix, layout, compression, precision)
    assert run.size("float16.parquet") < 0.55 * run.size("float32.parquet")
    file, expected = str(tmp_path / "float16.parquet"), matrix[3, 1000:].astype(np.float16).tolist()
    assert pd.read_parquet(file)["b"][3].tolist() == expected
    assert polars.read_parquet(file)["b"][3].to_list() == expected
    assert tuple(duckdb.sql(f"SELECT b FROM '{file}' WHERE index = 3").fetchall()[0][0]) == tuple(expected)


def test_a_feature_that_half_precision_has_no_number_for_is_told(tmp_path: Path) -> None:
    run, matrix = RunDirectory(str(tmp_path)), np.full((3, LAYOUT.n_features), 65504.0, np.float32)
    write(run, "f.parquet", np.arange(3), matrix, precision="float16")
    matrix[2, 3] = -65520.0
    with pytest.raises(UserError, match=r"a\.b reach 65,520, float16 only 65,504; expected .*float32"):
        write(run, "g.parquet", np.arange(3), matrix, precision="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["f.parquet"]


def test_rows_of_images_leave_out_those_that_were_skipped(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    write(run, "f.parquet", np.array([0, 2, 3, 7]), np.ones((8, LAYOUT.n_features), np.float32))
    matrix = read_features(run, ["f.parquet"])
    assert matrix.rows_of(np.array([7, 1, 2, 9, 0])).tolist() == [3, 1, 0]


def test_a_batch_is_a_row_group_and_no_column_has_nulls(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    write(run, "f.parquet", np.arange(7), np.ones((7, LAYOUT.n_features), np.float32))
    file = pq.ParquetFile(tmp_path / "f.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 2, 2]
    assert not any(field.nullable for field in file.schema_arrow)


def test_a_failure_while_writing_leaves_no_file(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))

    def batches() -> Iterator[dict[int, list[torch.Tensor]]]:
        yield {16: [torch.ones(2, width) for width in LAYOUT.widths]}
        raise RuntimeError("the backbone failed")

    with pytest.raises(RuntimeError, match="the backbone failed"):
        write_features(run, {"f.parquet": table_of(LAYOUT)}, np.arange(4), np.arange(4), batches())
    assert run.names("", recursive=True) == []


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    write(run, "f.parquet", np.arange(3), np.ones((3, LAYOUT.n_features), np.float32))
    other = FeatureLayout(("a", "b"), (3, 5))
    write(run, "g.parquet", np.arange(3), np.ones((3, other.n_features), np.float32), other)
    with pytest.raises(UserError, match=r"g\.parquet: expected taps"):
        read_features(run, ["f.parquet", "g.parquet"])
    with pytest.raises(UserError, match="at least one feature file"):
        read_features(run, [])
