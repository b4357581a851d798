"""Heads of one frozen backbone that read a single forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.loading import Backbone
from h2t.backbones.tap_reader import TapReader
from h2t.features import unit_norm
from h2t.head2toe import Head


class HeadModule(nn.Module):
    """A trained head: ``kept`` a buffer, ``weight`` and ``bias`` parameters without gradients."""

    kept: Tensor

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head, self.layout = head, head.layout.of_kept(head.kept)
        self.register_buffer("kept", torch.from_numpy(head.kept.copy()))
        self.weight, self.bias = (
            nn.Parameter(torch.from_numpy(values.copy()), requires_grad=False)
            for values in (head.weight, head.bias)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Logits float32 [b, n_classes] of raw features float32 [b, n_features]."""
        values = features[:, self.kept]
        if not self.head.raw:
            values = unit_norm(values, self.layout)
        logits = torch.addmm(self.bias, values, self.weight)
        if self.head.neighbours:
            votes = self.head.neighbours.logits(logits.detach().cpu().numpy())
            return torch.from_numpy(votes).to(logits.device)
        return logits


class SharedPass(nn.Module):
    """Computes the logits of heads, each of any task, from one forward pass of their backbone.

    Only taps with a feature that some head keeps are pooled, and the pass ends behind the last of them,
    unless gradients are wanted.
    """

    def __init__(self, backbone: Backbone, heads: Sequence[Head], aggregation: Aggregation = PAPER) -> None:
        super().__init__()
        used = {tap for head in heads for tap in head.taps_read()}
        # A head may keep nothing, but some tap has to say how many images there are.
        self.needed = backbone.only(used or {backbone.taps[0].name})
        names = [tap.name for tap in self.needed.taps]
        self.target_sizes = [head.hyperparameters.target_size for head in heads]
        self.aggregation = aggregation
        self.backbone = backbone.model
        self.heads = nn.ModuleList(HeadModule(head.restricted(names)) for head in heads)
        self.heads.to(next(self.backbone.parameters()).device)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Of each head, float32 [b, n_classes]; ``images`` float [b, 3, S, S] as the backbone takes them."""
        wanted = images.requires_grad or any(weight.requires_grad for weight in self.parameters())
        sizes, gradients = sorted(set(self.target_sizes)), wanted and torch.is_grad_enabled()
        # The hooks live as long as the pass: a backbone may have many heads that come and go.
        with TapReader(self.needed, sizes, self.aggregation, gradients=gradients) as reader:
            taps = reader.pooled(images) if torch.compiler.is_exporting() else reader(images)
        features = {size: torch.cat(pooled, 1) for size, pooled in taps.items()}
        return [head(features[size]) for head, size in zip(self.heads, self.target_sizes, strict=True)]
