"""Where each tap's features lie in a feature matrix, and their unit norm (section 4 of the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

from h2t.errors import UserError, unknown

Matrix = TypeVar("Matrix", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class FeatureLayout:
    """The taps of a feature matrix [n, N], in network order, and how many consecutive columns each has."""

    taps: tuple[str, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.taps) == len(self.widths), "one width per tap"

    @property
    def n_features(self) -> int:
        """N, the number of columns of all taps together."""
        return sum(self.widths)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [n_taps + 1]: the columns of tap i are offsets[i] up to offsets[i + 1]."""
        return np.concatenate([[0], np.cumsum(self.widths)]).astype(np.int64)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The columns of each tap."""
        return tuple(slice(int(a), int(b)) for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    def tap_of(self, features: np.ndarray) -> np.ndarray:
        """int64 [K], which tap each of the columns ``features`` int64 [K] belongs to."""
        return np.searchsorted(self.offsets, features, side="right") - 1

    def subset(self, taps: Sequence[str]) -> "FeatureLayout":
        """The layout of some taps alone, in network order whatever the order of ``taps``.

        Raises UserError for a tap that is not there.
        """
        for name in taps:
            if name not in self.taps:
                raise unknown("tap", name, self.taps)
        pairs = [(t, w) for t, w in zip(self.taps, self.widths, strict=True) if t in set(taps)]
        return FeatureLayout(tuple(t for t, _ in pairs), tuple(w for _, w in pairs))


def unit_norm(features: Matrix, layout: FeatureLayout, out: Matrix | None = None) -> Matrix:
    """Each example's features divided by their Euclidean norm, tap by tap; zeros stay zeros.

    ``features``: float [n, N], not written unless it is given as ``out`` too. Returns ``out``, float [n, N].
    """
    _check_width(features, layout)
    if out is None:
        out = np.empty_like(features) if isinstance(features, np.ndarray) else torch.empty_like(features)
    for columns in layout.slices:
        out[:, columns] = features[:, columns] / _nonzero_norms(features[:, columns])
    return out


def select(features: Matrix, layout: FeatureLayout, kept: np.ndarray) -> Matrix:
    """The kept features, of unit norm per example and tap **over what is kept of the tap**.

    ``features``: float [n, N], never written; ``kept``: int64 [K], ascending columns. Returns float [n, K].
    """
    _check_width(features, layout)
    widths = np.bincount(layout.tap_of(kept), minlength=len(layout.taps))
    if isinstance(features, np.ndarray):
        chosen = features[:, kept]
    else:
        chosen = features[:, torch.from_numpy(np.array(kept)).to(features.device)]
    return unit_norm(chosen, FeatureLayout(layout.taps, tuple(widths.tolist())), out=chosen)


def _check_width(features: np.ndarray | torch.Tensor, layout: FeatureLayout) -> None:
    if features.ndim != 2 or features.shape[1] != layout.n_features:
        raise UserError(f"features of shape {tuple(features.shape)}: expected [n, {layout.n_features}]")


def _nonzero_norms(features: Matrix) -> Matrix:
    """float [n, 1], the Euclidean norm of each row, 1 where it is 0."""
    if isinstance(features, np.ndarray):
        norms = np.sqrt(np.einsum("ij,ij->i", features, features))[:, None]
        return np.where(norms > 0, norms, norms.dtype.type(1))
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return torch.where(norms > 0, norms, torch.ones_like(norms))
