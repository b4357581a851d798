"""Features as columns of Arrow tables: a list of float32 or float16 per tap, without nulls."""

from collections.abc import Sequence

import pyarrow as pa
import torch

from h2t.device import fetched
from h2t.errors import UserError
from h2t.features import FeatureLayout
from h2t.precision import StoredPrecision

_TYPES = {"float32": pa.float32(), "float16": pa.float16()}


def tap_fields(layout: FeatureLayout, precision: StoredPrecision = "float32") -> list[pa.Field]:
    """The column of each tap."""
    value = pa.field("element", _TYPES[precision], nullable=False)
    return [
        pa.field(name, pa.list_(value, width), nullable=False)
        for name, width in zip(layout.taps, layout.widths, strict=True)
    ]


def tap_columns(
    taps: Sequence[torch.Tensor], layout: FeatureLayout, precision: StoredPrecision = "float32"
) -> list[pa.Array]:
    """The values of the columns, from float32 [n, width] of each tap in order.

    Raises UserError for a feature that float16 has no number for, where that is asked for.
    """
    if precision == "float16":
        taps = [_halved(tap, name) for tap, name in zip(taps, layout.taps, strict=True)]
    pairs = zip(fetched(taps), tap_fields(layout, precision), strict=True)
    return [
        pa.FixedSizeListArray.from_arrays(pa.array(values.contiguous().numpy().reshape(-1)), type=field.type)
        for values, field in pairs
    ]


def _halved(tap: torch.Tensor, name: str) -> torch.Tensor:
    halves = tap.half()
    if bool((halves.isinf() & tap.isfinite()).any()):
        raise UserError(
            f"features of {name} reach {float(tap.abs().max()):,.0f}, float16 only "
            f"{torch.finfo(torch.float16).max:,.0f}; expected features.precision: float32"
        )
    return halves
