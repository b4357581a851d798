"""The layout of taps in a feature matrix, and the unit norm of features (section 4 of the paper)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, overload

import numpy as np
import torch

from h2t.errors import UserError

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
        """int64 [K], the tap that each of the columns ``features`` int64 [K] belongs to."""
        return np.searchsorted(self.offsets, features, side="right") - 1

    def of_kept(self, kept: np.ndarray) -> "FeatureLayout":
        """The layout of the columns ``kept`` int64 [K] alone: the same taps, some perhaps of width 0."""
        widths = np.bincount(self.tap_of(kept), minlength=len(self.taps))
        return FeatureLayout(self.taps, tuple(widths.tolist()))


class TapFeatures(ABC):
    """Raw features of images that lie elsewhere: those of one tap at a time are read to memory."""

    layout: FeatureLayout

    @abstractmethod
    def read(self, tap: int) -> np.ndarray:
        """The features of a tap, float32 or float16 [n, width]."""

    def kept(
        self, layout: FeatureLayout, kept: np.ndarray, rows: np.ndarray | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Features of some rows, tap by tap: where they stand among the columns ``kept``, and float32 [m, k].

        ``layout``: that of the columns, some of the taps here.
        """
        position = dict(zip(self.layout.taps, range(len(self.layout.taps)), strict=True))
        for name, columns in zip(layout.taps, layout.slices, strict=True):
            start, stop = np.searchsorted(kept, (columns.start, columns.stop))
            if start < stop:
                values = self.read(position[name])
                yield slice(start, stop), keep_columns(values, kept[start:stop] - columns.start, rows)


WIDENED_AT_ONCE = 64  # rows

EMBEDDING = "pre_logits"
"""The tap that a backbone's own classifier reads."""


def default_embedding(taps: Sequence[str]) -> str:
    """The tap that methods on the embedding read, unless another is named: ``pre_logits``, or the last."""
    return EMBEDDING if EMBEDDING in taps else taps[-1]


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


@overload
def keep_features(
    features: TapFeatures | np.ndarray,
    layout: FeatureLayout,
    kept: np.ndarray,
    rows: np.ndarray | None = None,
    *,
    raw: bool = False,
) -> np.ndarray: ...


@overload
def keep_features(
    features: torch.Tensor,
    layout: FeatureLayout,
    kept: np.ndarray,
    rows: np.ndarray | None = None,
    *,
    raw: bool = False,
) -> torch.Tensor: ...


def keep_features(
    features: TapFeatures | np.ndarray | torch.Tensor,
    layout: FeatureLayout,
    kept: np.ndarray,
    rows: np.ndarray | None = None,
    *,
    raw: bool = False,
) -> np.ndarray | torch.Tensor:
    """The kept features, of unit norm per example and tap **over what is kept of the tap**; or as they are.

    ``features``: float [n, N], never written; ``kept``: int64 [K], ascending columns; ``rows``: int64 [m],
    the examples (default: all, in order); ``raw``: without any norm. Returns a new float [m, K], float32 of
    NumPy's float16.
    """
    if isinstance(features, TapFeatures):
        parts = [part for _, part in features.kept(layout, kept, rows)]
        values = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    else:
        _check_width(features, layout)
        if isinstance(features, np.ndarray):
            values = keep_columns(features, kept, rows)
        else:
            kept_values = _taken(features, kept, rows)
            return kept_values if raw else unit_norm(kept_values, layout.of_kept(kept), out=kept_values)
    return values if raw else unit_norm(values, layout.of_kept(kept), out=values)


def keep_columns(features: np.ndarray, kept: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Some columns, and rows, of features as they are: a new float [m, K], float32 of float16."""
    return (_widened if features.dtype == np.float16 else _taken)(features, kept, rows)


def _taken(features: Matrix, kept: np.ndarray, rows: np.ndarray | None) -> Matrix:
    index = kept if isinstance(features, np.ndarray) else torch.from_numpy(np.array(kept)).to(features.device)
    if rows is None:
        return features[:, index]
    if len(kept) and kept[-1] - kept[0] + 1 == len(kept):  # consecutive: a slice is faster
        return features[rows, int(kept[0]) : int(kept[-1]) + 1]
    return features[rows[:, None], index]


def _widened(features: np.ndarray, kept: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """float32 [m, K] of float16, some rows at a time: both copies of all would be half as much again."""
    rows = np.arange(len(features)) if rows is None else rows
    values = np.empty((len(rows), len(kept)), np.float32)
    for start in range(0, len(rows), WIDENED_AT_ONCE):
        part = slice(start, start + WIDENED_AT_ONCE)
        # By torch, three times as fast as NumPy.
        torch.from_numpy(values[part]).copy_(torch.from_numpy(_taken(features, kept, rows[part])))
    return values


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
