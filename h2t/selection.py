"""From weights to relevance scores, and from scores to the features that are kept (Section 3.2)."""

import numpy as np
import torch
from torch import Tensor

from h2t.errors import UserError


def relevance_scores(weight: Tensor | np.ndarray) -> np.ndarray:
    """Relevance of each feature, float32 [n_features]: the sum over classes of its squared weights.

    ``weight`` [n_features, n_classes]. This is the square of s_i in Section 3.2, which ranks alike.
    """
    values = torch.as_tensor(weight)
    return torch.einsum("fc,fc->f", values, values).cpu().numpy()


def keep_top(scores: np.ndarray, keep_fraction: float) -> np.ndarray:
    """Indices of the highest scores, int64 [n_kept] ascending; equal scores go to the lower index.

    ``n_kept`` is ``int(n_features * keep_fraction)``, computed in float64, which may be 0. Raises UserError
    for a fraction outside (0, 1].
    """
    if not 0 < keep_fraction <= 1:
        raise UserError(f"expected a keep_fraction in (0, 1], got {keep_fraction}")
    n_kept = int(len(scores) * float(keep_fraction))
    order = np.argsort(-np.asarray(scores), kind="stable")
    return np.sort(order[:n_kept]).astype(np.int64)
