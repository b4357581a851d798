"""What computes here: the device, what it is called, and what makes its results those of others."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch

STRICT = {"MKL_CBWR": "AVX2,STRICT", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Environment in which all processors with AVX2 sum in the same order, with any number of threads.

To be set before torch is imported. It has no say over GPUs.
"""


def default_device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_threads(count: int) -> None:
    """Have this process compute on a CPU with so many threads, whatever its environment asks for.

    That holds for PyTorch and for the BLAS of NumPy and of SciPy, which are libraries of their own.
    """
    from threadpoolctl import threadpool_limits

    import_module("scipy.linalg")  # whose BLAS is told only once it is there
    torch.set_num_threads(count)
    threadpool_limits(count, user_api="blas")


def slow_in_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 by way of float32, at a tenth of its speed.

    That is so without a GPU on processors without AVX-512.
    """
    by_onednn = default_device() == "cpu" and torch.backends.mkldnn.is_available()
    return by_onednn and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def sent(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """A tensor of main memory on a device; a GPU goes on with its earlier work meanwhile."""
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def fetched(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors in main memory; copies from a GPU go side by side, at ten times the speed of ordinary ones."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    torch.cuda.current_stream().synchronize()
    return copies


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let products and convolutions on a GPU round float32 to TF32, or not; a setting of the whole process.

    PyTorch by itself lets convolutions alone do it.
    """
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = allowed
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


@cache
def processor() -> str:
    """The name of the GPU, or of the processor with the instructions that torch uses there."""
    if default_device() == "cuda":
        return torch.cuda.get_device_name()
    return f"{_model_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _model_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "CPU"
