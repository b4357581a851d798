"""Heads of one frozen backbone that read a single forward pass."""

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.loading import Backbone
from h2t.backbones.tap_reader import TapReader
from h2t.head2toe import Head, HeadBank


class SharedPass:
    """Computes the logits of heads, each of any task, from one forward pass of their backbone.

    Only taps with a feature that some head keeps are pooled, and the pass ends behind the last of them. Its
    hooks stay until it is closed; use it as a context manager.
    """

    def __init__(self, backbone: Backbone, heads: Sequence[Head], aggregation: Aggregation = PAPER) -> None:
        used = {tap for head in heads for tap in head.taps_read()}
        # A head may keep nothing, but some tap has to say how many images there are.
        needed = backbone.only(used or {backbone.taps[0].name})
        names = [tap.name for tap in needed.taps]
        sizes = sorted({head.hyperparameters.target_size for head in heads})
        device = str(next(backbone.model.parameters()).device)
        self.banks = [HeadBank([head.restricted(names)], device) for head in heads]
        self.reader = TapReader(needed, sizes, aggregation)

    def logits(self, images: Tensor) -> list[np.ndarray]:
        """Of each head, float32 [b, n_classes]; ``images`` float [b, 3, S, S] as the backbone takes them."""
        features = {size: torch.cat(taps, 1) for size, taps in self.reader(images).items()}
        return [bank.logits(features)[0] for bank in self.banks]

    def close(self) -> None:
        """Remove the hooks."""
        self.reader.close()

    def __enter__(self) -> "SharedPass":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
