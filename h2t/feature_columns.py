"""Features as columns of Arrow tables: a list of float32 per tap, without nulls."""

from collections.abc import Sequence

import pyarrow as pa
import torch

from h2t.device import fetched
from h2t.features import FeatureLayout


def tap_fields(layout: FeatureLayout) -> list[pa.Field]:
    """The column of each tap."""
    value = pa.field("element", pa.float32(), nullable=False)
    return [
        pa.field(name, pa.list_(value, width), nullable=False)
        for name, width in zip(layout.taps, layout.widths, strict=True)
    ]


def tap_columns(taps: Sequence[torch.Tensor], layout: FeatureLayout) -> list[pa.Array]:
    """The values of the columns, from float32 [n, width] of each tap in order."""
    pairs = zip(fetched(taps), tap_fields(layout), strict=True)
    return [
        pa.FixedSizeListArray.from_arrays(pa.array(values.contiguous().numpy().reshape(-1)), type=field.type)
        for values, field in pairs
    ]
