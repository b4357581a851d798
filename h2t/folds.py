"""Index sets of the cross-validation that chooses hyperparameters (section 4 of the paper)."""

from typing import Literal

import numpy as np

from h2t.errors import UserError, unknown

FoldScheme = Literal["blocks", "archive"]
SCHEMES: tuple[FoldScheme, ...] = ("blocks", "archive")


def folds(
    n_samples: int, n_folds: int = 5, scheme: FoldScheme = "blocks"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and validation rows of each fold: consecutive blocks of the given row order.

    The schemes differ in the images behind the rows, not in the indices; so results name the scheme.
    ``blocks`` is the paper's: five blocks of the first 1000 images of the original training set, of which the
    last 200 are not among VTAB's 800 + 200. ``archive`` is what holders of a VTAB-1k archive can do: its 800
    training rows in four blocks, and as the fifth its 200 validation rows.

    Returns:
        ``n_folds`` pairs of int64 arrays (training rows, validation rows), each ascending; the validation
        rows of all folds together are every row once.

    Raises:
        UserError: fewer than two folds, fewer rows than folds, or ``archive`` with other than five folds.
    """
    if scheme not in SCHEMES:
        raise unknown("fold scheme", scheme, SCHEMES)
    if n_folds < 2:
        raise UserError(f"cross-validation needs at least 2 folds, got {n_folds}")
    if scheme == "archive" and n_folds != 5:
        raise UserError(f"fold scheme 'archive' has exactly 5 folds, got {n_folds}")
    if n_samples < n_folds:
        raise UserError(f"cannot cut {n_samples} training images into {n_folds} folds: too few")
    rows = np.arange(n_samples, dtype=np.int64)
    blocks = np.array_split(rows, n_folds)
    return [(np.setdiff1d(rows, block, assume_unique=True), block) for block in blocks]
