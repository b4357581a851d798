"""What features are stored in."""

from typing import Literal

StoredPrecision = Literal["float32", "float16"]
"""Parquet knows no bfloat16."""
BYTES: dict[StoredPrecision, int] = {"float32": 4, "float16": 2}
