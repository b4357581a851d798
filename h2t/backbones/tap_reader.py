"""Read activations during one forward pass, pooling each inside its hook so that they never add up."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock, get_ident
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.loading import Backbone
from h2t.backbones.pooling import falls_back, pool_to_all, pooled_size
from h2t.backbones.tap import Tap
from h2t.device import tf32
from h2t.errors import UserError
from h2t.features import FeatureLayout

Collect = Callable[[int, Tensor], None]
Seen = TypeVar("Seen")


class _AllRead(Exception):
    """Ends a forward pass behind the last tap."""


class TapReader:
    """Reads the pooled features of every tap in one forward pass; its hooks stay until it is closed.

    The pass ends with the last tap of the backbone's: fewer taps may cost less than a whole pass.

    Use it as a context manager, or call `close`. With ``gradients`` the features carry them back to the
    images and to the weights that require them; without, they are inference tensors.

    With ``compiled`` the backbone and the pooling of every tap become one graph for ``torch.compile``: the
    first batch takes a minute or so, the others less than before on a GPU. Where that fails, a warning says
    why and the reader goes on without.
    """

    def __init__(
        self,
        backbone: Backbone,
        target_sizes: Sequence[int],
        aggregation: Aggregation = PAPER,
        *,
        gradients: bool = False,
        compiled: bool = False,
    ) -> None:
        _check(backbone, target_sizes, aggregation)
        self.backbone = backbone
        self.target_sizes = tuple(target_sizes)
        self.aggregation = aggregation
        self.gradients = gradients
        self._pooled: dict[int, dict[int, Tensor]] = {}  # by tap and target size
        self._hooks, self._lock = _Hooks(backbone, self._collect), Lock()
        self._largest_batch = 0
        self._compiled = torch.compile(self.pooled, fullgraph=True, dynamic=False) if compiled else None

    def __call__(self, images: Tensor) -> dict[int, list[Tensor]]:
        """Features of images float [b, 3, S, S]: per target size, one float32 [b, width] per tap in order."""
        parameter = next(self.backbone.model.parameters())
        batch = images.to(parameter.device, parameter.dtype)
        if self._compiled is not None:
            batch = self._filled_up(batch)
        batch = batch.contiguous(memory_format=torch.channels_last)
        with (
            self._lock,
            torch.set_grad_enabled(self.gradients),
            torch.inference_mode(not self.gradients),
            tf32(self.backbone.precision == "tf32"),
        ):
            try:
                features = self.pooled(batch) if self._compiled is None else self._pooled_by_compiled(batch)
            finally:
                self._hooks.stop()
        return {size: [tap[: len(images)] for tap in taps] for size, taps in features.items()}

    def pooled(self, batch: Tensor) -> dict[int, list[Tensor]]:
        """Features of images that lie on the backbone's device in its precision: what is compiled."""
        self._pooled = {}  # and not cleared: the compiled graph would be bound to what it held
        self._hooks.start()
        if self._ends_early:
            with suppress(_AllRead):
                self.backbone.model(batch)
        else:  # a graph has no early end, and where there are gradients, what comes later may want them
            self.backbone.model(batch)
        taps, self._pooled = [self._pooled[index] for index in range(len(self.backbone.taps))], {}
        return {size: [pooled[size] for pooled in taps] for size in self.target_sizes}

    @property
    def _ends_early(self) -> bool:
        return not (self.gradients or torch.compiler.is_compiling())

    def _filled_up(self, batch: Tensor) -> Tensor:
        """The batch with as many images as the largest seen: every number of images is compiled anew."""
        self._largest_batch = max(self._largest_batch, len(batch))
        missing = self._largest_batch - len(batch)
        return torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)]) if missing else batch

    def _pooled_by_compiled(self, batch: Tensor) -> dict[int, list[Tensor]]:
        assert self._compiled is not None
        try:
            return self._compiled(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the base of what dynamo and inductor raise
            reason = " ".join(str(error).split("\n")[:2])
            warnings.warn(
                f"{self.backbone.name} cannot be compiled and runs as it is: {reason}", stacklevel=3
            )
            self._compiled = None
            return self.pooled(batch)

    def _collect(self, index: int, activation: Tensor) -> None:
        if self.gradients:
            # Later layers may overwrite an activation that the backward pass of the pooling still needs.
            activation = activation.clone()
        self._pooled[index] = pool_to_all(
            activation, self.target_sizes, self.aggregation, self.backbone.n_prefix
        )
        if self._ends_early and len(self._pooled) == len(self.backbone.taps):
            raise _AllRead

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.remove()

    def __enter__(self) -> "TapReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class TapRow:
    """The facts of a tap before any image is read; ``features``: their number at each target size."""

    tap: str
    module: str
    shape: tuple[int, ...]
    features: dict[int, int]


def describe(
    backbone: Backbone, target_sizes: Sequence[int], aggregation: Aggregation = PAPER
) -> list[TapRow]:
    """The taps of a backbone in network order, with shapes and numbers of features."""
    _check_whole(backbone, target_sizes, aggregation)
    shapes = tap_shapes(backbone)
    return [
        TapRow(
            tap.name,
            tap.module if tap.point == "output" else f"{tap.module} (input)".strip(),
            shapes[tap.name],
            {
                size: pooled_size(shapes[tap.name], size, aggregation, backbone.n_prefix)
                for size in target_sizes
            },
        )
        for tap in backbone.taps
    ]


def tap_shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    """The shape of one image's activation at each tap, in network order: (c, h, w), (t, c) or (c,)."""
    return look_at_taps(backbone, lambda activation: tuple(activation.shape[1:]))


def look_at_taps(backbone: Backbone, look: Callable[[Tensor], Seen]) -> dict[str, Seen]:
    """What ``look`` says of each tap's activation when a pass of one image comes to it, in network order."""
    seen: dict[int, Seen] = {}
    hooks = _Hooks(backbone, lambda index, activation: seen.update({index: look(activation)}))
    parameter = next(backbone.model.parameters())
    size = backbone.image_size
    try:
        hooks.start()
        with torch.inference_mode():
            backbone.model(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    finally:
        hooks.remove()
    return {tap.name: seen[index] for index, tap in enumerate(backbone.taps)}


def feature_layout(backbone: Backbone, target_size: int, aggregation: Aggregation = PAPER) -> FeatureLayout:
    """The layout of a backbone's feature matrix: which columns come from which tap.

    Warns where a tap is too small for the target, so that the official rule takes the mean of all its
    positions.
    """
    _check_whole(backbone, [target_size], aggregation)
    shapes = tap_shapes(backbone)
    small = [
        name
        for name, shape in shapes.items()
        if falls_back(shape, target_size, aggregation, backbone.n_prefix)
    ]
    if small:
        warnings.warn(
            f"{backbone.name} at target size {target_size}: {len(small)} of {len(shapes)} taps are too small "
            "for a pooling window and give the mean over all positions, as in the official code: "
            f"{', '.join(small)}",
            stacklevel=2,
        )
    widths = tuple(
        pooled_size(shape, target_size, aggregation, backbone.n_prefix) for shape in shapes.values()
    )
    return FeatureLayout(tuple(shapes), widths)


class _Hooks:
    """Hands the activation of every tap, by the tap's index, to ``collect`` during a forward pass."""

    def __init__(self, backbone: Backbone, collect: Collect) -> None:
        self._collect = collect
        self._model = backbone.model
        self._calls: dict[tuple[str, str], int] = {}
        self._thread: int | None = None  # of the pass that is ours
        taps_at: dict[tuple[str, str], list[tuple[int, Tap]]] = {}
        for index, tap in enumerate(backbone.taps):
            taps_at.setdefault((tap.module, tap.point), []).append((index, tap))
        self._handles = [self._install(hook, taps) for hook, taps in taps_at.items()]

    def start(self) -> None:
        """Count calls of modules from the beginning of a forward pass."""
        self._calls, self._thread = {}, _this_thread()

    def stop(self) -> None:
        """Let passes be that are none of ours: others may read the same model, at the same time too."""
        self._thread = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _install(self, hook: tuple[str, str], taps: list[tuple[int, Tap]]) -> RemovableHandle:
        name, point = hook
        module = self._model.get_submodule(name)
        if point == "input":
            return module.register_forward_pre_hook(lambda module, given: self._see(hook, taps, given[0]))
        return module.register_forward_hook(lambda module, given, returned: self._see(hook, taps, returned))

    def _see(self, hook: tuple[str, str], taps: list[tuple[int, Tap]], activation: Tensor) -> None:
        if self._thread != _this_thread():
            return
        call = self._calls[hook] = self._calls.get(hook, -1) + 1
        for index, tap in taps:
            if tap.call == call:
                self._collect(index, _arranged(activation, tap, self._model))


def _this_thread() -> int:
    """The thread; always the same while a graph is made, which has none."""
    return 0 if torch.compiler.is_compiling() else get_ident()


def _arranged(activation: Tensor, tap: Tap, model: nn.Module) -> Tensor:
    """The activation of a tap as [b, c, h, w], [b, t, c] or [b, c]."""
    if tap.form == "map_channels_last":
        return activation.permute(0, 3, 1, 2)
    if tap.form == "first_token":
        return activation[:, 0]
    if tap.form == "vector":
        return activation.flatten(1)
    if tap.prepend:
        first = model.get_parameter(tap.prepend).expand(activation.shape[0], -1, -1)
        return torch.cat([first, activation], dim=1)
    return activation


def _check(backbone: Backbone, target_sizes: Sequence[int], aggregation: Aggregation) -> None:
    for size in target_sizes:
        if size < 1:
            raise UserError(f"target size {size}: expected a whole number from 1")
    # The first token of such a model is a corner of the image.
    if aggregation.cls_token != "normal" and not any(
        "cls_token" in name for name, _ in backbone.model.named_parameters()
    ):
        raise UserError(
            f"{backbone.name} has no class token: expected the treatment 'normal', got "
            f"'{aggregation.cls_token}'"
        )


def _check_whole(backbone: Backbone, target_sizes: Sequence[int], aggregation: Aggregation) -> None:
    """Check a backbone with all of its taps: of some, those that are left may have no tokens."""
    _check(backbone, target_sizes, aggregation)
    if aggregation.tokens == "grid" and not any(tap.form == "tokens" for tap in backbone.taps):
        raise UserError(f"{backbone.name} has no tokens to arrange: expected tokens 'sequence', got 'grid'")
