"""What a Parquet file says that it expands to: one of absurd size is refused before it is read.

Equal values are stored once, so that a file of a megabyte may hold rows that no memory does.
"""

import pyarrow.parquet as pq

from h2t.errors import UserError

LARGEST_ROWS = 10_000_000  # of one file; ImageNet has 1.3 million in hundreds of them
FINE_BYTES = 2**30  # that a file may expand to in any case
LARGEST_EXPANSION = 1000  # of a larger one; float32 features that are nearly all zeros reach some hundreds
# Bytes of a value in memory; texts and bytes take at least their place in the list of them.
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}
_WIDTH_OF_OTHERS = 8


def check_expansion(metadata: pq.FileMetaData, name: str) -> None:
    """Raise UserError for a file whose rows or bytes in memory are out of all proportion."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    n_rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    if n_rows > LARGEST_ROWS:
        raise UserError(
            f"{name} has {n_rows:,} rows, expected at most {LARGEST_ROWS:,} in one Parquet file: it is not "
            "read; cut it into several files if it is what it should be"
        )
    stored = expanded = 0
    for group in groups:
        for number in range(group.num_columns):
            column = group.column(number)
            stored += column.total_compressed_size
            width = _WIDTHS.get(column.physical_type, _WIDTH_OF_OTHERS)
            expanded += max(column.total_uncompressed_size, width * column.num_values)
    if expanded > max(FINE_BYTES, LARGEST_EXPANSION * stored):
        raise UserError(
            f"{name} would take {expanded / 2**30:,.1f} GiB of memory for {stored:,} bytes on disk, expected "
            f"at most {LARGEST_EXPANSION} times as much: it is not read"
        )
