"""Train a backbone together with a linear head: the methods that Head2Toe is compared with.

``scratch`` starts from random weights and ``finetune`` from pretrained ones, both with a head on the
embedding; ``head2toe_ft`` (section 4, "Head2Toe-FT") starts from pretrained weights with a head on the
features that Head2Toe kept, read through the taps, so that gradients reach the backbone from every tap with
a kept feature.

What comes from where:

- the paper (Appendix A): rates {0.1, 0.01}, steps {500, 5000}, chosen by five-fold cross-validation,
  "following the lightweight sweep" of VTAB; Head2Toe-FT uses the same search for its second training and
  keeps the target size, coefficient and fraction that Head2Toe chose;
- VTAB's trainer (google-research/task_adaptation): SGD with momentum 0.9, neither weight decay nor
  augmentation. Its stepwise decay is not the paper's;
- the official code (google-research/head2toe, with ``finetune_backbones``): cosine decay to zero, batches of
  128 in a new order every epoch, a loss of (sum of cross-entropies) / 128 that gives the short last batch
  less weight, batch norm on batch statistics in training and on running ones in evaluation, unit norm of each
  tap's kept features (of the embedding for ``finetune``), and a new Glorot-uniform head with zero bias, for
  Head2Toe-FT too. Its optimizer is a setting there, "adam" by default or "sgd" with momentum 0.9, one for the
  scores and the second training alike; the paper names SGD for fine-tuning and says nothing of Head2Toe-FT's:
  here, scores come from Adam, as Head2Toe's, and the second training is by SGD, as fine-tuning;
- ours: orders, the head and what is random in the backbone are drawn by the seed of a training; momentum is
  PyTorch's, v <- 0.9 v + g, w <- w - rate v, whereas TensorFlow's keeps the rate in the velocity,
  v <- 0.9 v - rate g, w <- w + v. The two differ where the rate changes from step to step: under the cosine
  decay a gradient counts here with the rate of the step that it moves, there with that of its own step, so
  TensorFlow's steps are a little longer (at most by the decay within about ten steps). The paper names
  neither.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed import all_reduce, get_rank, get_world_size, is_initialized
from torch.nn.parallel import DistributedDataParallel

from h2t.backbones.aggregation import PAPER, Aggregation
from h2t.backbones.loading import Backbone
from h2t.backbones.tap_reader import TapReader, feature_layout
from h2t.checksum import check_digest, tensor_digest
from h2t.device import sent, tf32
from h2t.errors import UserError
from h2t.features import FeatureLayout, unit_norm
from h2t.heads.spec import Precision
from h2t.images.preprocessing import Preprocessing, to_batch
from h2t.packed import unpack

LOSSES_CHECKED_EVERY = 50  # reading a loss waits for a GPU
MODEL = "model"  # the metadata entry of a saved model


class OutOfMemory(UserError):
    """A batch does not fit in memory."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Options of a training; the module's text says where the defaults come from.

    ``batch_norm`` "frozen" normalizes by the pretrained statistics in training too;
    ``gradient_accumulation``: passes that a batch is computed in; ``checkpoint_every``: steps.
    """

    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_norm: Literal["batch", "frozen"] = "batch"
    precision: Precision = "float32"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    checkpoint_every: int = 250


@dataclass(frozen=True)
class KeptFeatures:
    """Input of a head: ``kept`` int64 [n_kept], ascending features of ``layout`` at ``target_size``."""

    kept: np.ndarray
    layout: FeatureLayout
    target_size: int


def embedding_features(backbone: Backbone, target_size: int = 1) -> KeptFeatures:
    """All features of the embedding, which does not depend on the target size."""
    layout = feature_layout(backbone.only((backbone.embedding,)), target_size)
    return KeptFeatures(np.arange(layout.n_features, dtype=np.int64), layout, target_size)


class TrainableModel(nn.Module):
    """A backbone whose weights require gradients, the features it gives, and a linear head on them.

    Only taps with a kept feature are read. ``seed`` draws the head.
    """

    def __init__(
        self,
        backbone: Backbone,
        features: KeptFeatures,
        n_classes: int,
        *,
        options: FinetuneOptions,
        seed: int = 0,
        aggregation: Aggregation = PAPER,
    ) -> None:
        super().__init__()
        tap_of, layout = features.layout.tap_of(features.kept), features.layout
        used = np.unique(tap_of)
        kept = [features.kept[tap_of == tap] - layout.offsets[tap] for tap in used]
        names = tuple(layout.taps[tap] for tap in used)
        self.layout = FeatureLayout(names, tuple(len(columns) for columns in kept))
        self.target_size, self.options = features.target_size, options
        weight = next(backbone.model.parameters())
        self.kept = [torch.from_numpy(columns).to(weight.device) for columns in kept]
        read = replace(backbone.only(names), precision=options.precision)
        self.reader = TapReader(read, [self.target_size], aggregation, gradients=True)
        self.backbone = backbone.model.requires_grad_(True)
        self.head = nn.Linear(self.layout.n_features, n_classes)
        nn.init.xavier_uniform_(self.head.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)
        self.head.to(weight.device)
        if options.gradient_checkpointing:
            _checkpoint_gradients(backbone, names)

    def forward(self, images: Tensor) -> Tensor:
        """Logits float32 [b, n_classes] of images float [b, 3, S, S]."""
        self.reader.gradients = torch.is_grad_enabled()
        half = self.options.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            taps = self.reader(images)[self.target_size]
        kept = torch.cat([tap[:, columns] for tap, columns in zip(taps, self.kept, strict=True)], 1)
        return self.head(unit_norm(kept.float(), self.layout))

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
    """The course of a training.

    ``losses`` float32 [steps done]: mean cross-entropy of each step's batch before its update, nats;
    ``seconds``: wall time of the steps, with those before the checkpoint that it went on from;
    ``diverged_at``: the step, counted from 1, whose loss was not finite, or None.
    """

    losses: np.ndarray
    seconds: float
    diverged_at: int | None = None


@dataclass(frozen=True)
class Checkpoints:
    """Access to the saved state of a training: ``save`` replaces it, ``load`` returns it, or None."""

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
    shuffle: Sequence[int] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Training:
    """Train all weights of the model for ``steps`` steps, going on from a checkpoint where there is one.

    ``images``: as ``h2t.images.preprocessing.prepare`` leaves them, uint8 [height, width, 3] each;
    ``labels`` integer [n]. ``shuffle``: numbers that, with the seed, draw the order of every epoch; None
    takes the images as they come. In a process group of torch.distributed every process is given all images
    and takes its part of each batch; results are those of one process, but for batch norm on batch
    statistics, which sees the part of a process (and, under gradient accumulation, of a pass) alone.

    Raises UserError where a batch has fewer images than there are processes, OutOfMemory where it does not
    fit in memory.
    """
    options = model.options
    passes = f"gradient_accumulation {options.gradient_accumulation}"
    too_large = f"a batch of {options.batch_size} images does not fit in memory ({passes})"
    shuffled_by = None if shuffle is None else [*shuffle, seed]
    batches = _Batches(images, labels, preprocessing, options, shuffled_by)
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
        with out_of_memory(too_large), tf32(options.precision == "tf32"):
            losses[step] = _step(runner, optimizer, batches, step)
        if (step + 1) % LOSSES_CHECKED_EVERY == 0 or step + 1 == steps:
            diverged = torch.nonzero(~losses[: step + 1].isfinite()).flatten().tolist()
            if diverged:
                end = diverged[0] + 1
                return Training(losses[:end].cpu().numpy(), time.perf_counter() - started, end)
    model.eval()
    return Training(losses.cpu().numpy(), time.perf_counter() - started)


def predict_logits(
    model: TrainableModel, images: Sequence[np.ndarray], preprocessing: Preprocessing, batch_size: int = 50
) -> np.ndarray:
    """Logits float32 [n, n_classes] of prepared images, uint8 [height, width, 3] each, in evaluation mode.

    Raises OutOfMemory where ``batch_size`` images are too many at once.
    """
    model.eval()
    parts = [np.empty((0, model.head.out_features), np.float32)]
    with torch.no_grad(), out_of_memory(f"predicting {batch_size} images at once does not fit in memory"):
        for start in range(0, len(images), batch_size):
            batch = to_batch(images[start : start + batch_size], preprocessing, model.head.weight.device)
            parts.append(model(batch).cpu().numpy())
    return np.concatenate(parts)


def save_model(model: TrainableModel, features: KeptFeatures, content: dict[str, Any]) -> bytes:
    """The adapted model as one safetensors file: weights, kept features, and ``content`` (plain values).

    ``Adapter.load`` needs the entry ``backbone`` of ``content``, a recipe's section of that name, and takes
    the names of classes from ``classes``, where that is a list.
    """
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    tensors["kept"] = torch.from_numpy(features.kept)
    described = {"target_size": features.target_size, **asdict(features.layout)}
    described |= {"precision": model.options.precision, "content": content}
    described["sha256"] = tensor_digest(save(tensors))
    return save(tensors, metadata={MODEL: json.dumps(described, sort_keys=True)})


def load_model(
    data: bytes, backbone: Backbone, options: FinetuneOptions, aggregation: Aggregation = PAPER
) -> tuple[TrainableModel, dict[str, Any]]:
    """An adapted model in evaluation mode, and its content; ``backbone`` gives the architecture alone."""
    tensors, described = load(data), read_metadata(data)[MODEL]
    check_digest(data, described["sha256"])
    layout = FeatureLayout(tuple(described["taps"]), tuple(described["widths"]))
    features = KeptFeatures(tensors.pop("kept").numpy(), layout, described["target_size"])
    plain = replace(options, gradient_checkpointing=False)
    model = TrainableModel(
        backbone, features, len(tensors["head.bias"]), options=plain, aggregation=aggregation
    )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit {backbone.name}: {error}") from error
    return model.eval().requires_grad_(False), described["content"]


def model_content(data: bytes) -> dict[str, Any]:
    """The ``content`` that :func:`save_model` was given, without loading any weights."""
    return read_metadata(data)[MODEL]["content"]


def read_metadata(data: bytes) -> dict[str, Any]:
    """Read the metadata of a safetensors file. Raises ValueError where it is not ours."""
    try:  # the file begins with the length of its header, a little-endian uint64, and the header, JSON too
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {entry: _values(text) for entry, text in header["__metadata__"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError("it has no metadata of ours") from error


def _values(text: str) -> Any:
    return json.loads(text) if text.startswith("{") else unpack(text)


@contextmanager
def out_of_memory(message: str) -> Iterator[None]:
    """Turn running out of memory, however torch says it, into OutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if known or any(sign in str(error).lower() for sign in ("allocate", "alloc_fail")):
            raise OutOfMemory(message) from error
        raise


class _Batches:
    """The rows of every step, cut into this process's part and that into passes."""

    def __init__(
        self,
        images: Sequence[np.ndarray],
        labels: np.ndarray,
        preprocessing: Preprocessing,
        options: FinetuneOptions,
        shuffled_by: Sequence[int] | None,
    ) -> None:
        self.shuffled_by = shuffled_by
        self.images, self.preprocessing, self.options = images, preprocessing, options
        self.labels = torch.from_numpy(np.asarray(labels, np.int64))
        self.rank, self.workers = (get_rank(), get_world_size()) if is_initialized() else (0, 1)
        self.count = -(-len(images) // options.batch_size)
        if (smallest := self.size(self.count - 1)) < self.workers:
            raise UserError(
                f"the last batch of {len(images)} training images has {smallest}, fewer than the "
                f"{self.workers} processes that share it; change batch_size or the number of processes"
            )

    def rows(self, step: int) -> list[np.ndarray]:
        """Rows of the passes of one step, int64 each."""
        first = step % self.count * self.options.batch_size
        batch = self.order(step // self.count)[first : first + self.size(step)]
        part = batch[self.rank :: self.workers]
        passes = np.array_split(part, self.options.gradient_accumulation)
        return [rows for rows in passes if len(rows)]

    def order(self, epoch: int) -> np.ndarray:
        """The order of all images in an epoch, int64, the same in every process and after a checkpoint."""
        if self.shuffled_by is None:
            return np.arange(len(self.images))
        return np.random.default_rng([*self.shuffled_by, epoch]).permutation(len(self.images))

    def size(self, step: int) -> int:
        """Images of all processes in one step."""
        first = step % self.count * self.options.batch_size
        return min(self.options.batch_size, len(self.images) - first)


def _step(runner: nn.Module, optimizer: torch.optim.Optimizer, batches: _Batches, step: int) -> Tensor:
    """One update; the mean cross-entropy of the whole batch before it."""
    device = next(runner.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    passes = batches.rows(step)
    for number, rows in enumerate(passes):
        last = number + 1 == len(passes)
        # Gradients of processes are averaged in the last pass of a step only.
        with runner.no_sync() if isinstance(runner, DistributedDataParallel) and not last else nullcontext():
            images = to_batch([batches.images[row] for row in rows], batches.preprocessing, device)
            labels = sent(batches.labels[rows], device)
            loss = nn.functional.cross_entropy(runner(images), labels, reduction="sum")
            with _statistics_kept(runner):
                # Gradients of the processes are averaged, hence their number.
                (loss * (batches.workers / batches.options.batch_size)).backward()
        total += loss.detach()
    optimizer.step()
    if batches.workers > 1:
        all_reduce(total)
    return total / batches.size(step)


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
        if (velocity := optimizer.state[parameter].get("momentum_buffer")) is not None:
            tensors[f"velocity.{name}"] = velocity.contiguous()
    tensors["losses"], tensors["step"], tensors["seconds"] = losses, torch.tensor(step), torch.tensor(seconds)
    return save(tensors)


def _restore(
    model: TrainableModel, optimizer: torch.optim.Optimizer, losses: Tensor, checkpoints: Checkpoints | None
) -> tuple[int, float]:
    """Take up a checkpoint; the step to go on with, and the seconds spent until there."""
    data = checkpoints.load() if checkpoints else None
    if data is None:
        return 0, 0.0
    tensors = load(data)
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    for name, parameter in model.named_parameters():
        if (velocity := tensors.get(f"velocity.{name}")) is not None:
            # A new tensor would lose the memory format that later updates, and so their rounding, depend on.
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(velocity)
    losses.copy_(tensors["losses"])
    return int(tensors["step"]), float(tensors["seconds"])


def _checkpoint_gradients(backbone: Backbone, taps: tuple[str, ...]) -> None:
    if taps != (backbone.embedding,):
        raise UserError(
            "gradient_checkpointing: features are read inside the parts of the network that would be "
            "computed twice; use gradient_accumulation instead"
        )
    model: Any = backbone.model
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        problem = f"{backbone.name} does not offer it; use gradient_accumulation instead"
        raise UserError(f"gradient_checkpointing: {problem}") from None
