"""Products: what is missing in a folder, however the work was cut before."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from h2t.errors import UserError
from pipelines.products import Files, Gap, RowFiles, is_whole, shards
from pipelines.run_directory import RunDirectory


def row_files(n_rows: int = 20, tag: int = 0, folder: str = "f") -> RowFiles:
    return RowFiles(folder, "abc", "task", "train", n_rows, tag, "extract")


@given(st.integers(1, 60), st.lists(st.integers(1, 17), min_size=1, max_size=4), st.data())
def test_whatever_was_lost_and_however_it_is_cut_every_row_is_there_once(
    n_rows: int, sizes: list[int], data: st.DataObject
) -> None:
    table, names = row_files(n_rows), set[str]()
    run = RunDirectory("unused")
    for size in sizes:  # each round loses some files and makes what is missing in shards of another size
        for shard in shards(table.missing(run, sorted(names)), size):
            assert len(shard.indices) <= size
            names |= {name for _, name in shard.files}
        held = [row for name in names for row in table.rows(name)]
        assert sorted(held) == list(range(n_rows))
        assert not table.missing(run, sorted(names))
        names -= set(data.draw(st.lists(st.sampled_from(sorted(names)))))


def test_tables_that_lack_different_rows_get_those_alone() -> None:
    small, large = row_files(20, 16), row_files(20, 64)
    gaps = [Gap(small, 5, 20), Gap(large, 0, 10)]
    cut = [(shard.start, shard.stop, [tag for tag, _ in shard.files]) for shard in shards(gaps, 100)]
    assert cut == [(0, 5, [64]), (5, 10, [16, 64]), (10, 20, [16])]
    assert shards([], 100) == []


def test_files_of_another_key_or_too_many_rows_are_not_current() -> None:
    table = row_files(20)
    assert table.holds_rows(table.name(0, 20))
    assert not table.holds_rows(table.name(10, 30))
    assert not table.holds_rows("f/rows-000000-000020-xyz.parquet")
    assert not table.holds_rows("f/notes.txt")


def test_a_table_that_lacks_rows_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"f lacks rows in .*: run the extract stage first"):
        row_files().names(RunDirectory(str(tmp_path)))


def test_units_of_several_files_come_once() -> None:
    product = Files("f", {"f/a": "unit", "f/b": "unit", "f/c": "other"})
    assert product.missing(RunDirectory("unused"), ["f/c"]) == ["unit"]
    run = RunDirectory("unused")
    assert product.is_current(run, "f/a", "f/a")
    assert not product.is_current(run, "f/d", "f/d")


@pytest.mark.parametrize("ending", ["parquet", "safetensors", "json"])
def test_a_cut_or_emptied_file_is_not_whole(tmp_path: Path, ending: str) -> None:
    run, name = RunDirectory(str(tmp_path)), f"folder/file.{ending}"
    if ending == "parquet":
        run.write_table(name, pa.table({"a": list(range(100))}))
    elif ending == "safetensors":
        run.write(name, save({"a": np.zeros(100)}, metadata={"entry": "text"}))
    else:
        run.write_json(name, {"a": 1})
    assert is_whole(run, name)
    whole = run.read(name)
    for length in (0, 3, len(whole) // 2, len(whole) - 1 if ending != "json" else 5):
        run.write(name, whole[:length])
        assert not is_whole(run, name), length
