"""Features on disk: one row per image, one plain fixed-size list of float32 per tap."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from h2t.errors import UserError
from h2t.features import FeatureLayout
from h2t.store import RunDirectory

KEYS = ("index", "label")


def parquet_options(table: pa.Table) -> dict[str, Any]:
    """How feature tables are encoded: zstd level 1 over byte-stream-split values, no dictionaries."""
    split = [f"{name}.list.element" for name in table.column_names if name not in KEYS]
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": False,
        "write_statistics": False,
        "use_byte_stream_split": split,
    }


@dataclass(frozen=True)
class FeatureMatrix:
    """Features of one task and target size: ``values`` float32 [n, n_features], rows by index.

    ``index`` int32 [n] is the row in the source, ``labels`` int32 [n].
    """

    values: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    layout: FeatureLayout


def feature_table(
    index: np.ndarray, labels: np.ndarray, taps: Sequence[torch.Tensor], layout: FeatureLayout
) -> pa.Table:
    """Rows of a shard as a table; ``taps`` are float32 [n, width] in the order of ``layout``."""
    columns = {"index": pa.array(index, pa.int32()), "label": pa.array(labels, pa.int32())}
    for name, values in zip(layout.taps, taps, strict=True):
        flat = pa.array(values.contiguous().numpy().reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table(columns)


def read_features(
    run: RunDirectory, names: Sequence[str], taps: Sequence[str] | None = None
) -> FeatureMatrix:
    """Read feature files to one matrix, rows sorted by index; only the columns of ``taps`` where given."""
    table = run.read_table(names, columns=None if taps is None else [*KEYS, *taps])
    layout = _layout(table.schema)
    index = table["index"].to_numpy()
    order = np.argsort(index, kind="stable")
    values = np.empty((len(index), layout.n_features), np.float32)
    straight = bool(np.array_equal(order, np.arange(len(order))))
    for name, columns in zip(layout.taps, layout.slices, strict=True):
        _fill(values[:, columns], table[name], None if straight else np.argsort(order))
    return FeatureMatrix(values, table["label"].to_numpy()[order], index[order], layout)


def _fill(target: np.ndarray, column: pa.ChunkedArray, position: np.ndarray | None) -> None:
    start = 0
    for chunk in column.chunks:
        rows = chunk.flatten().to_numpy().reshape(len(chunk), -1)
        where: Any = slice(start, start + len(chunk))
        target[where if position is None else position[where]] = rows
        start += len(chunk)


def _layout(schema: pa.Schema) -> FeatureLayout:
    taps = [field for field in schema if field.name not in KEYS]
    for field in taps:
        if not pa.types.is_fixed_size_list(field.type):
            raise UserError(
                f"feature column '{field.name}' has type {field.type}; expected fixed_size_list<float>"
            )
    return FeatureLayout(tuple(f.name for f in taps), tuple(f.type.list_size for f in taps))
