"""``h2t doctor``: what of this machine and a recipe would stop or slow a run, before hours are spent."""

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from h2t.errors import UserError
from pipelines.config import Config
from pipelines.connection import LONGEST_FOLDER, stated_folder
from pipelines.machine import GIB, available_cores, available_memory, container_cores, memory_limit
from pipelines.run_directory import RunDirectory

Result = Literal["PASS", "WARN", "FAIL"]
N_SAMPLED = 3  # images of each split that are decoded


@dataclass(frozen=True)
class Finding:
    """What a check found; ``fix``: what to do about it, "" for PASS."""

    check: str
    result: Result
    found: str
    fix: str = ""


def examine_machine() -> list[Finding]:
    """What can be known without a recipe; takes a second or two."""
    checks = (_python, _packages, _cores, _memory, _shared_memory, _temporary_folder, _gpu, _bfloat16)
    return [check() for check in checks]


def failures() -> list[Finding]:
    """What would stop any run; asks no GPU for anything, since that would take some of its memory."""
    return [finding for check in (_python, _packages, _gpu) if (finding := check()).result == "FAIL"]


def examine_recipe(config: Config, run: RunDirectory) -> Iterator[Finding]:
    """What only a recipe tells: weights, images, and the run directory."""
    yield _said(
        "weights", lambda: _weights(config), "install the weights, or give a file as backbone.weights"
    )
    for task in config.tasks:
        yield _said(f"images of {task.name}", partial(_images, config, task.name), "see the message")
    yield _said("run directory", lambda: _writable(run), "choose another --run-dir")
    yield _room(config, run)


def _said(check: str, ask: Callable[[], str], fix: str) -> Finding:
    """A finding from what returns a text, or raises a UserError."""
    try:
        return Finding(check, "PASS", ask())
    except UserError as error:
        return Finding(check, "FAIL", str(error).splitlines()[0], fix)


def _python() -> Finding:
    found = platform.python_version()
    if tuple(map(int, found.split(".")[:2])) < (3, 11):
        return Finding("Python", "FAIL", found, "expected 3.11 or later")
    return Finding("Python", "PASS", found)


def _packages() -> Finding:
    """Whether what is installed is what this package asks for."""
    from packaging.requirements import Requirement

    missing = []
    try:
        required = requires("head2toe-ray") or []
    except PackageNotFoundError:
        return Finding(
            "packages", "WARN", "head2toe-ray runs from a folder", "pip install it, to have its needs"
        )
    for line in required:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            if version(wanted.name) not in wanted.specifier:
                missing.append(f"{wanted.name} {version(wanted.name)}, expected {wanted.specifier}")
        except PackageNotFoundError:
            missing.append(f"{wanted.name} is not there")
    if missing:
        return Finding("packages", "FAIL", "; ".join(missing), "pip install --upgrade head2toe-ray")
    named = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "timm", "pyarrow"))
    return Finding("packages", "PASS", named)


def _cores() -> Finding:
    cores, share = available_cores(), container_cores()
    if share is not None and share < cores:
        return Finding(
            "cores", "WARN", f"{cores} are seen, a container limits them to {share:g}",
            "start the container with its cores set apart (--cpuset-cpus), or run under taskset",
        )  # fmt: skip
    return Finding("cores", "PASS", str(cores))


def _memory() -> Finding:
    limit, free = memory_limit(), available_memory()
    text = f"{free / GIB:.1f} of {limit / GIB:.1f} GiB free"
    if free < 4 * GIB:
        return Finding("memory", "WARN", text, "a run takes 3 GiB and more: end other programs")
    return Finding("memory", "PASS", text)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "PASS", "no /dev/shm: Ray takes files")
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.2f} GiB free in /dev/shm"
    if free < 1.1 * GIB:
        return Finding(
            "shared memory", "WARN", text,
            "Ray keeps features there and will be slow without: start the container with --shm-size=4g "
            "or more",
        )  # fmt: skip
    return Finding("shared memory", "PASS", text)


def _temporary_folder() -> Finding:
    folder = stated_folder()
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {free / GIB:.1f} GiB free"
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        return Finding(
            "temporary folder", "WARN", f"{text}; its name is too long for Ray's sockets, so /tmp/ray "
            "is used",
            "set RAY_TMPDIR to a short path",
        )  # fmt: skip
    if free < 2 * GIB:
        return Finding("temporary folder", "WARN", text, "make room, or set RAY_TMPDIR to another disk")
    return Finding("temporary folder", "PASS", text)


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("GPU", "PASS", f"{torch.cuda.device_count()}; CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for processors alone"
        return Finding(
            "GPU", "FAIL", f"there is a GPU, but torch {torch.__version__} (build {build}) cannot use it",
            "install a build of torch that fits the driver: https://pytorch.org/get-started/locally",
        )  # fmt: skip
    return Finding("GPU", "PASS", "none: everything runs on the processor")


def _bfloat16() -> Finding:
    from h2t.device import processor, slow_in_bfloat16

    if slow_in_bfloat16():
        return Finding("bfloat16", "PASS", f"ten times slower than float32 on {processor()}: leave it")
    return Finding("bfloat16", "PASS", f"computed in hardware by {processor()}")


def _weights(config: Config) -> str:
    from h2t.backbones.pretrained import weights_identity

    section = config.backbone
    return f"{section.name}: {weights_identity(section.name, section.weights, section.sha256)}"


def _images(config: Config, name: str) -> str:
    from h2t.images.preprocessing import decode
    from h2t.images.source import BadImage
    from pipelines.task_data import open_task

    task = open_task(config, name)
    for split in task.sources:
        labels = task.labels[split]
        for row in range(0, len(labels), max(1, len(labels) // N_SAMPLED)):
            try:
                decode(task.read(split, [row])[0])
            except BadImage as error:
                raise UserError(f"{split} row {row} ({error.path}): {error.reason}") from None
    counts = ", ".join(f"{len(labels):,} {split}" for split, labels in task.labels.items())
    return f"{counts}; {task.n_classes} classes; a sample of each was decoded"


def _writable(run: RunDirectory) -> str:
    run.require_writable()
    return f"{run.uri} can be written to"


def _room(config: Config, run: RunDirectory) -> Finding:
    """Whether the features, by far the most of a run, fit on the disk."""
    from pipelines.plan import feature_bytes

    try:
        needed = feature_bytes(config)
    except UserError as error:
        return Finding("room", "WARN", f"not known: {str(error).splitlines()[0]}", "see the message")
    if not run.local:
        return Finding("room", "PASS", f"{needed / GIB:.2f} GiB of features go to an object store")
    there = next(folder for folder in (Path(run.uri), *Path(run.uri).parents) if folder.exists())
    free = shutil.disk_usage(there).free
    text = f"{needed / GIB:.2f} GiB of features, {free / GIB:.1f} GiB free"
    if needed * 1.2 > free:
        return Finding("room", "FAIL", text, "make room, or choose another --run-dir or fewer target sizes")
    return Finding("room", "PASS", text)
