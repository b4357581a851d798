"""Products of features on disk: for each tap a file, with a row per image, the products with all images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from h2t.errors import UserError
from h2t.features import FeatureLayout
from pipelines.feature_files import KEYS, rows_of
from pipelines.products import Files
from pipelines.run_directory import RunDirectory

PRODUCTS = "products"


def gram_table(keys: Sequence[str | int], tap: str, products: np.ndarray, index: np.ndarray,
               labels: np.ndarray) -> pa.Table:  # fmt: skip
    """Rows of a tap: ``products`` float32 [n, n]; ``index``, ``labels`` int [n]; the first keys of KEYS."""
    n_rows = len(index)
    shared = [pa.repeat(pa.scalar(value, kind), n_rows)
              for value, kind in zip(keys, KEYS.values(), strict=False)]  # fmt: skip
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(products.reshape(-1)), type=pa.list_(pa.field("element", pa.float32(), False), n_rows)
    )
    columns = [
        *shared,
        pa.repeat(tap, n_rows),
        pa.array(index, pa.int32()),
        pa.array(labels, pa.int32()),
        values,
    ]
    return pa.table(columns, names=[*list(KEYS)[:4], "tap", "index", "label", PRODUCTS])


@dataclass(frozen=True)
class StoredGrams:
    """Products in files, of which those of one tap at a time are read to memory.

    ``names``: a file per tap of ``layout``; ``index`` int32 [n]: rows in the source; ``labels`` int32 [n].
    """

    run: RunDirectory
    names: Sequence[str]
    layout: FeatureLayout
    index: np.ndarray
    labels: np.ndarray

    def read(self, tap: int) -> np.ndarray:
        """The products float32 [n, n] of a tap's features, of unit norm, less their means."""
        name = self.names[tap]
        table = self.run.read_table([name], ["index", PRODUCTS])
        if not np.array_equal(table["index"].to_numpy(), self.index):
            raise UserError(f"{name} has other images than {self.names[0]}: run the extract stage again")
        values = table[PRODUCTS].combine_chunks().flatten().to_numpy()
        return values.reshape(len(self.index), len(self.index))

    def rows_of(self, indices: np.ndarray) -> np.ndarray:
        """Rows that hold the images ``indices``, in that order; skipped images are left out."""
        return rows_of(self.index, indices)


def open_grams(run: RunDirectory, product: Files, layout: FeatureLayout) -> StoredGrams:
    """The products of all taps of a task. Raises UserError where some are missing."""
    names = list(product.units)
    if product.missing(run, run.names(product.folder)):
        raise UserError(f"{product.folder} lacks taps in {run.uri}: run the extract stage first")
    keys = run.read_table([names[0]], ["index", "label"])
    return StoredGrams(run, names, layout, keys["index"].to_numpy(), keys["label"].to_numpy())
