"""What this machine, or the container that this process is in, has."""

import os
from pathlib import Path

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def container_cores() -> float | None:
    """Cores whose time a container is limited to; None without a limit."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        text = (CGROUP / "memory.max").read_text().strip()
    except OSError:
        return total
    return total if text == "max" else min(total, int(text))


def available_memory() -> int:
    """Bytes of memory that are free, at most the limit."""
    import psutil

    return min(int(psutil.virtual_memory().available), memory_limit())
