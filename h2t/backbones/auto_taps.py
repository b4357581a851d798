"""Find the taps of any timm model by watching one forward pass of blank images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from h2t.backbones.presets import LOGITS
from h2t.backbones.tap import Form, Tap

PROBE_BATCH = 2
GATES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.MultiheadAttention)
ACTIVATION_SOURCES = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")
NORMS_OF_LAST_AXIS = ("LayerNorm", "RmsNorm", "RMSNorm", "SimpleNorm")


def discover_taps(model: nn.Module, image_size: int) -> tuple[Tap, ...]:
    """Find the taps of a model, in the order of its forward pass.

    They are the output of every normalization layer, or of the activation function that reads it directly
    where one does; of every other activation function; the input of the classifier, `pre_logits`; and
    `logits`. Of several classifiers the widest counts, of equal ones the first; the inputs of the others are
    taps as well. Left out are activations of one position (the gates of squeeze-and-excitation, what follows
    the global pooling), and those not laid out over the image: attention heads, windows moved to the batch
    axis, mixed tokens.
    """
    watcher = _Watcher(_classifier_names(model))
    with _watched(model, watcher), torch.inference_mode():
        logits = model(torch.zeros(PROBE_BATCH, 3, image_size, image_size))
    taps = [*watcher.taps, *watcher.embeddings()]
    if model.num_classes and isinstance(logits, Tensor) and logits.ndim == 2:
        taps.append(LOGITS)
    return tuple(taps)


def fused_modules(model: nn.Module) -> frozenset[str]:
    """The modules that normalize and then activate."""
    return frozenset(
        name for name, module in model.named_modules() if _is_norm(module) and hasattr(module, "act")
    )


@dataclass
class _Watcher:
    """The record of a forward pass so far: its taps, and what tells the layout of the next activation."""

    classifiers: frozenset[str]
    taps: list[Tap] = field(default_factory=list)
    classified: dict[str, tuple[Form, int]] = field(default_factory=dict)  # form and width of what each reads
    calls: dict[str, int] = field(default_factory=dict)
    channels_last: bool = False
    n_tokens: int = 0
    normalized: Tensor | None = None

    def see(self, name: str, module: nn.Module, given: Tensor, returned: Tensor) -> None:
        call = self.calls[name] = self.calls.get(name, -1) + 1
        if name in self.classifiers:
            self.see_classifier(name, module, given)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            self.channels_last = isinstance(module, nn.Linear)
        elif _is_norm(module):
            self.see_norm(name, call, module, returned)
        elif self.form_of_activation(returned):
            self.see_activation(name, call, given, returned)

    def see_classifier(self, name: str, module: nn.Module, given: Tensor) -> None:
        form: Form = "tokens" if given.ndim == 3 else "map" if given.shape[2:].numel() > 1 else "vector"
        if form == "map" and (self.channels_last or isinstance(module, nn.Linear)):
            form = "map_channels_last"
        self.classified.setdefault(name, (form, given[0].numel()))

    def embeddings(self) -> list[Tap]:
        """The inputs of the classifiers, `pre_logits` last."""
        by_width = sorted(reversed(self.classified.items()), key=lambda item: item[1][1])
        taps = [Tap(name.replace(".", "_"), name, form, "input") for name, (form, _) in by_width]
        return [*taps[:-1], *(replace(tap, name="pre_logits") for tap in taps[-1:])]

    def see_norm(self, name: str, call: int, module: nn.Module, returned: Tensor) -> None:
        self.channels_last = _normalizes_last_axis(module)
        self.normalized = returned
        if returned.ndim == 3:
            self.n_tokens = returned.shape[1]
        form = _form(returned, self.channels_last)
        if form and not (form == "tokens" and not self.channels_last):
            self.taps.append(_tap(name, call, form))

    def see_activation(self, name: str, call: int, given: Tensor, returned: Tensor) -> None:
        form = self.form_of_activation(returned)
        assert form
        if given is self.normalized and self.taps:
            self.taps.pop()
            self.normalized = None
        self.taps.append(_tap(name, call, form))

    def form_of_activation(self, returned: Tensor) -> Form | None:
        form = _form(returned, self.channels_last)
        mixed = form == "tokens" and self.n_tokens not in (0, returned.shape[1])
        return None if mixed else form


@contextmanager
def _watched(model: nn.Module, watcher: _Watcher) -> Iterator[None]:
    inside_norms = {
        child
        for module in model.modules()
        if _is_norm(module)
        for child in module.modules()
        if child is not module
    }
    handles = [
        module.register_forward_hook(
            lambda module, given, returned, name=name: watcher.see(name, module, given[0], returned)
        )
        for name, module in model.named_modules()
        if module not in inside_norms
        and (name in watcher.classifiers or _is_norm(module) or _is_activation(module) or _sets_axes(module))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tap(module: str, call: int, form: Form) -> Tap:
    """A tap named after its module; dots would read as nested columns in most query tools."""
    suffix = f"_call{call + 1}" if call else ""
    return Tap(module.replace(".", "_") + suffix, module, form, call=call)


def _form(activation: Tensor, channels_last: bool) -> Form | None:
    """The layout of a square image's activation; None where that is not laid out over the image."""
    if activation.shape[0] != PROBE_BATCH:
        return None
    if activation.ndim == 3:
        return "tokens" if activation.shape[1] > 1 else None
    if activation.ndim != 4:
        return None
    height, width = activation.shape[1:3] if channels_last else activation.shape[2:]
    if height != width or height == 1:
        return None
    return "map_channels_last" if channels_last else "map"


def _classifier_names(model: nn.Module) -> frozenset[str]:
    classifier = model.get_classifier()  # type: ignore[operator]  # every timm model has it
    several = isinstance(classifier, tuple | list | nn.ModuleList)
    classifiers = list(classifier) if several else [classifier]
    return frozenset(
        name for name, module in model.named_modules() if any(module is each for each in classifiers)
    )


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    children = {name for name, _ in module.named_children()}
    return "Norm" in name and not name.startswith("GlobalResponse") and children <= {"drop", "act"}


def _normalizes_last_axis(module: nn.Module) -> bool:
    name = type(module).__name__
    return name.startswith(NORMS_OF_LAST_AXIS) and "2d" not in name


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ in ACTIVATION_SOURCES and not isinstance(module, GATES)


def _sets_axes(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)
