"""Index sets of the cross-validation that chooses hyperparameters (section 4 of the paper)."""

import numpy as np

from h2t.errors import UserError


def folds(n_samples: int, n_folds: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut rows into consecutive blocks, the longer first; each is the validation rows of a fold.

    Returns ``n_folds`` pairs of ascending int64 arrays (training rows, validation rows). Raises UserError for
    fewer than two folds, or fewer rows than folds.
    """
    from sklearn.model_selection import KFold  # takes a second to import

    if n_folds < 2:
        raise UserError(f"cross-validation needs at least 2 folds, got {n_folds}")
    if n_samples < n_folds:
        raise UserError(f"cannot cut {n_samples} training images into {n_folds} folds: too few")
    return list(KFold(n_folds).split(np.empty(n_samples)))
