"""Trains a backbone together with a linear head: the methods that Head2Toe is compared with.

``scratch`` starts from random weights and ``finetune`` from pretrained ones, both with a head on the
embedding; ``head2toe_ft`` (section 4, "Head2Toe-FT") starts from pretrained weights with a head on the
features that Head2Toe selected, read through the taps, so that gradients reach the backbone from every tap
that keeps a feature.

What comes from where:

- the paper (Appendix A): rates {0.1, 0.01}, steps {500, 5000}, chosen by five-fold cross-validation,
  "following the lightweight sweep" of VTAB; Head2Toe-FT uses the same search for its second training and
  keeps the target size, coefficient and fraction that Head2Toe chose;
- VTAB's trainer (google-research/task_adaptation): SGD with momentum 0.9, neither weight decay nor
  augmentation. Its stepwise decay is not the paper's;
- the official code (google-research/head2toe, with ``finetune_backbones``): cosine decay to zero, batches of
  128 cut from one fixed order and repeated without reshuffling, a loss of (sum of cross-entropies) / 128 that
  gives the short last batch less weight, batch norm on batch statistics in training and on running ones in
  evaluation, unit norm of each tap's kept features (of the embedding for ``finetune``), and a new
  Glorot-uniform head with zero bias, for Head2Toe-FT too. Its optimizer is a setting there, "adam" by default
  or "sgd" with momentum 0.9; the paper's text decides;
- ours: the order is shuffled once by the run's seed; the seed of a training draws the head and what is random
  in the backbone; momentum is PyTorch's, which keeps the rate out of the velocity.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed import all_reduce, get_rank, get_world_size, is_initialized
from torch.nn.parallel import DistributedDataParallel

from h2t.backbones.loading import Backbone
from h2t.backbones.pooling import ClassToken
from h2t.backbones.tap_reader import TapReader, feature_layout
from h2t.errors import UserError
from h2t.features import FeatureLayout, unit_norm
from h2t.images.preprocessing import Preprocessing, to_batch
from pipelines.config import FinetuneConfig

LOSSES_CHECKED_EVERY = 50  # reading a loss waits for a GPU


@dataclass(frozen=True)
class Selection:
    """What a head reads: ``kept`` int64 [n_kept], ascending features of ``layout`` at ``target_size``."""

    kept: np.ndarray
    layout: FeatureLayout
    target_size: int


def embedding_selection(backbone: Backbone, target_size: int = 1) -> Selection:
    """All features of the embedding, which does not depend on the target size."""
    alone = replace(backbone, taps=tuple(tap for tap in backbone.taps if tap.name == backbone.embedding))
    layout = feature_layout(alone, target_size)
    return Selection(np.arange(layout.n_features, dtype=np.int64), layout, target_size)


class TrainableModel(nn.Module):
    """A backbone whose weights require gradients, the features it gives, and a linear head on them.

    Only taps that keep a feature are read. ``seed`` draws the head.
    """

    def __init__(
        self,
        backbone: Backbone,
        selection: Selection,
        n_classes: int,
        *,
        options: FinetuneConfig,
        seed: int = 0,
        cls_token: ClassToken = "normal",
    ) -> None:
        super().__init__()
        places = [np.flatnonzero(selection.layout.tap_of(selection.kept) == tap) for tap in _taps(selection)]
        names = tuple(selection.layout.taps[tap] for tap in _taps(selection))
        self.layout = FeatureLayout(names, tuple(len(place) for place in places))
        self.target_size, self.options = selection.target_size, options
        weight = next(backbone.model.parameters())
        self.kept = [
            torch.from_numpy(selection.kept[place] - selection.layout.offsets[tap]).to(weight.device)
            for tap, place in zip(_taps(selection), places, strict=True)
        ]
        taps = tuple(tap for tap in backbone.taps if tap.name in names)
        self.reader = TapReader(replace(backbone, taps=taps), [self.target_size], cls_token, gradients=True)
        self.backbone = backbone.model.requires_grad_(True)
        self.head = _new_head(self.layout.n_features, n_classes, seed).to(weight.device)
        if options.gradient_checkpointing:
            _checkpoint_gradients(backbone, names)

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [b, n_classes] of images float [b, 3, S, S]."""
        self.reader.gradients = torch.is_grad_enabled()
        half = self.options.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            taps = self.reader(images)[self.target_size]
        chosen = torch.cat([tap[:, kept] for tap, kept in zip(taps, self.kept, strict=True)], 1)
        return self.head(unit_norm(chosen.float(), self.layout))

    def train(self, mode: bool = True) -> "TrainableModel":
        """Training or evaluation mode; frozen batch norm keeps its pretrained statistics in both."""
        super().train(mode)
        if self.options.batch_norm == "frozen":
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


@dataclass
class Training:
    """How a training went.

    ``losses`` float32 [steps done]: mean cross-entropy of each step's batch before its update, nats;
    ``seconds``: wall time of the steps, with those before the checkpoint that it went on from;
    ``diverged_at``: the step, counted from 1, whose loss was not finite, or None.
    """

    losses: np.ndarray
    seconds: float
    diverged_at: int | None = None


@dataclass(frozen=True)
class Checkpoints:
    """Where a training keeps its state: ``save`` replaces what is there, ``load`` returns it or None."""

    load: Callable[[], bytes | None]
    save: Callable[[bytes], None]


def train(
    model: TrainableModel,
    images: Sequence[np.ndarray],
    labels: np.ndarray,
    preprocessing: Preprocessing,
    *,
    learning_rate: float,
    steps: int,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
) -> Training:
    """Train all weights of the model for ``steps`` steps, going on from a checkpoint where there is one.

    ``images``: as ``h2t.images.prepare`` leaves them, uint8 [height, width, 3] each, used in the order given;
    ``labels`` integer [n]. In a process group of torch.distributed every process is given all images and
    takes its part of each batch; results are those of one process, but for batch norm on batch statistics,
    which sees the part of a process (and, under gradient accumulation, of a pass) alone.

    Raises UserError where a batch has fewer images than there are parts, or does not fit in memory.
    """
    options = model.options
    batches = _Batches(images, labels, preprocessing, options)
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, options.momentum, weight_decay=options.weight_decay
    )
    losses = torch.full((steps,), math.nan, device=model.head.weight.device)  # copying each would wait for it
    start, seconds = _restore(model, optimizer, losses, checkpoints)
    started = time.perf_counter() - seconds
    runner = DistributedDataParallel(model, find_unused_parameters=True) if batches.workers > 1 else model
    model.train()
    for step in range(start, steps):
        if checkpoints and step > start and step % options.checkpoint_every == 0 and batches.rank == 0:
            checkpoints.save(_state(model, optimizer, losses, step, time.perf_counter() - started))
        optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        torch.manual_seed(seed * 1_000_003 + step * batches.workers + batches.rank)
        with memory_advice(_training_advice(options)):
            losses[step] = _step(runner, optimizer, batches, step)
        if (step + 1) % LOSSES_CHECKED_EVERY == 0 or step + 1 == steps:
            diverged = _first_not_finite(losses[: step + 1])
            if diverged is not None:
                return Training(losses[:diverged].cpu().numpy(), time.perf_counter() - started, diverged)
    model.eval()
    return Training(losses.cpu().numpy(), time.perf_counter() - started)


def predict_logits(
    model: TrainableModel, images: Sequence[np.ndarray], preprocessing: Preprocessing, batch_size: int = 50
) -> np.ndarray:
    """Logits float32 [n, n_classes] of prepared images, uint8 [height, width, 3] each, in evaluation mode.

    Raises UserError where ``batch_size`` images do not fit in memory.
    """
    model.eval()
    device = model.head.weight.device
    parts = [np.empty((0, model.head.out_features), np.float32)]
    advice = f"predicting {batch_size} images at once does not fit in memory; lower resources.batch_size"
    with torch.no_grad(), memory_advice(advice):
        for start in range(0, len(images), batch_size):
            batch = to_batch(images[start : start + batch_size], preprocessing, device)
            parts.append(model(batch).cpu().numpy())
    return np.concatenate(parts)


def save_model(model: TrainableModel, selection: Selection, content: dict[str, Any]) -> bytes:
    """The adapted model as one safetensors file: weights, kept features, and ``content`` (plain values)."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    tensors["kept"] = torch.from_numpy(selection.kept)
    described = {"target_size": selection.target_size, "taps": selection.layout.taps,
                 "widths": selection.layout.widths, "content": content}  # fmt: skip
    return save(tensors, metadata={"model": json.dumps(described, sort_keys=True)})


def load_model(
    data: bytes, backbone: Backbone, options: FinetuneConfig, cls_token: ClassToken = "normal"
) -> tuple[TrainableModel, dict[str, Any]]:
    """An adapted model in evaluation mode, and its content; ``backbone`` gives the architecture alone."""
    tensors, described = load(data), _metadata(data)
    layout = FeatureLayout(tuple(described["taps"]), tuple(described["widths"]))
    selection = Selection(tensors.pop("kept").numpy(), layout, described["target_size"])
    plain = options.model_copy(update={"gradient_checkpointing": False})
    model = TrainableModel(backbone, selection, len(tensors["head.bias"]), options=plain, cls_token=cls_token)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False), described["content"]


def model_content(data: bytes) -> dict[str, Any]:
    """What :func:`save_model` was given as ``content``, without loading any weights."""
    return _metadata(data)["content"]


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turns running out of memory into a UserError that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if (
            isinstance(error, torch.OutOfMemoryError | MemoryError)
            or "allocate" in text
            or "alloc_fail" in text
        ):
            raise UserError(advice) from error
        raise


def _training_advice(options: FinetuneConfig) -> str:
    return (
        f"finetune: a batch of {options.batch_size} images does not fit in memory; raise "
        f"finetune.gradient_accumulation (now {options.gradient_accumulation}: the batch is computed in "
        "so many parts), set finetune.gradient_checkpointing: true "
        f"(now {str(options.gradient_checkpointing).lower()}) or "
        f"finetune.precision: bfloat16 (now {options.precision}), or lower finetune.batch_size"
    )


class _Batches:
    """The rows of every step, cut into this process's part and that into passes."""

    def __init__(
        self,
        images: Sequence[np.ndarray],
        labels: np.ndarray,
        preprocessing: Preprocessing,
        options: FinetuneConfig,
    ) -> None:
        self.images, self.preprocessing, self.options = images, preprocessing, options
        self.labels = torch.from_numpy(np.asarray(labels, np.int64))
        self.rank, self.workers = (get_rank(), get_world_size()) if is_initialized() else (0, 1)
        self.count = -(-len(images) // options.batch_size)
        smallest = len(images) - (self.count - 1) * options.batch_size
        if smallest < self.workers:
            raise UserError(
                f"finetune: the last batch of {len(images)} training images has {smallest}, fewer than "
                f"workers_per_trial ({self.workers}); change finetune.batch_size or workers_per_trial"
            )

    def rows(self, step: int) -> list[np.ndarray]:
        """Rows of the passes of one step, int64 each."""
        first = step % self.count * self.options.batch_size
        last = min(first + self.options.batch_size, len(self.images))
        mine = np.arange(first, last)[self.rank :: self.workers]
        passes = np.array_split(mine, self.options.gradient_accumulation)
        return [rows for rows in passes if len(rows)]

    def size(self, step: int) -> int:
        """Images of all processes in one step."""
        first = step % self.count * self.options.batch_size
        return min(self.options.batch_size, len(self.images) - first)

    def read(self, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images float32 [b, 3, S, S] and labels int64 [b] of some rows."""
        batch = to_batch([self.images[row] for row in rows], self.preprocessing, device)
        return batch, self.labels[rows].to(device)


def _step(runner: nn.Module, optimizer: torch.optim.Optimizer, batches: _Batches, step: int) -> Tensor:
    """One update; the mean cross-entropy of the whole batch before it."""
    device = next(runner.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    passes = batches.rows(step)
    for number, rows in enumerate(passes):
        with _no_sync(runner, number + 1 < len(passes)):
            images, labels = batches.read(rows, device)
            loss = nn.functional.cross_entropy(runner(images), labels, reduction="sum")
            with _statistics_kept(runner):
                # Gradients of the processes are averaged, hence their number.
                (loss * (batches.workers / batches.options.batch_size)).backward()
        total += loss.detach()
    optimizer.step()
    if batches.workers > 1:
        all_reduce(total)
    return total / batches.size(step)


def _no_sync(runner: nn.Module, more: bool) -> AbstractContextManager[Any]:
    """Gradients of processes are averaged in the last pass of a step only."""
    if more and isinstance(runner, DistributedDataParallel):
        return runner.no_sync()
    return nullcontext()


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norm leaves its running statistics as they are.

    Gradient checkpointing runs layers again in the backward pass, on a batch that they have counted.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _state(
    model: TrainableModel, optimizer: torch.optim.Optimizer, losses: Tensor, step: int, seconds: float
) -> bytes:
    """Everything that the next step depends on, as safetensors."""
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        velocity = optimizer.state[parameter].get("momentum_buffer")
        if velocity is not None:
            tensors[f"velocity.{name}"] = velocity.contiguous()
    tensors["losses"], tensors["step"], tensors["seconds"] = losses, torch.tensor(step), torch.tensor(seconds)
    return save(tensors)


def _restore(
    model: TrainableModel,
    optimizer: torch.optim.Optimizer,
    losses: Tensor,
    checkpoints: Checkpoints | None,
) -> tuple[int, float]:
    """Take up a checkpoint; the step to go on with, and the seconds spent until there."""
    data = checkpoints.load() if checkpoints else None
    if data is None:
        return 0, 0.0
    tensors = load(data)
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    for name, parameter in model.named_parameters():
        velocity = tensors.get(f"velocity.{name}")
        if velocity is not None:
            # A new tensor would lose the memory format that later updates, and so their rounding, depend on.
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(velocity)
    losses.copy_(tensors["losses"])
    return int(tensors["step"]), float(tensors["seconds"])


def _first_not_finite(losses: Tensor) -> int | None:
    bad = torch.nonzero(~torch.isfinite(losses))
    return int(bad[0]) + 1 if len(bad) else None


def _taps(selection: Selection) -> list[int]:
    """Numbers of the taps that keep a feature, ascending."""
    return np.unique(selection.layout.tap_of(selection.kept)).tolist()


def _new_head(n_features: int, n_classes: int, seed: int) -> nn.Linear:
    """A head with Glorot-uniform weights drawn by the seed and zero bias."""
    head = nn.Linear(n_features, n_classes)
    nn.init.xavier_uniform_(head.weight, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head


def _checkpoint_gradients(backbone: Backbone, taps: tuple[str, ...]) -> None:
    if taps != (backbone.embedding,):
        raise UserError(
            "finetune.gradient_checkpointing: head2toe_ft reads features inside the parts of the network "
            "that would be computed twice; use finetune.gradient_accumulation instead"
        )
    model: Any = backbone.model
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise UserError(
            f"finetune.gradient_checkpointing: {backbone.name} does not offer it; use "
            "gradient_accumulation instead"
        ) from None


def _metadata(data: bytes) -> dict[str, Any]:
    """The file's header is a little-endian uint64 length and as many bytes of JSON."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["model"])
