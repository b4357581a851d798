"""The Ray cluster: what it has, and what of a run it can hold at once."""

from dataclasses import dataclass

from h2t.errors import UserError
from pipelines.config import Resources
from pipelines.machine import GIB

OBJECT_STORE_BYTES = 1 << 30  # of a cluster that is started here, beside what feature matrices take
RESERVED_FROM = 2**30  # bytes of memory
SPARE_CPUS = 2  # logical CPUs for reading and decoding: actors that hold every CPU would starve those


@dataclass(frozen=True)
class Cluster:
    """Logical resources of the cluster; ``local`` when it was started here, on ``cores`` real cores.

    Of the nodes that are there, ``store_bytes`` are those of the largest object store, ``memory_bytes`` those
    of the most memory beside it. ``store_folder``: where the object store lies that was started here and has
    no room in the machine's shared memory.
    """

    cpus: int
    gpus: int
    nodes: int
    local: bool
    cores: int
    store_bytes: int = OBJECT_STORE_BYTES
    memory_bytes: int = 0
    store_folder: str = ""


def backbone_actors(cluster: Cluster, resources: Resources) -> tuple[int, float]:
    """How many backbone actors to start, and the GPUs of each.

    Raises UserError when the cluster can't hold them beside one task that reads images.
    """
    gpus = resources.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if cluster.gpus else 0.0
    if gpus:
        count = resources.actors or max(1, int(cluster.gpus / gpus))
        if count * gpus > cluster.gpus:
            raise UserError(f"resources: {count} actors of {gpus:g} GPUs need {count * gpus:g} GPUs, "
                            f"the cluster has {cluster.gpus}")  # fmt: skip
        return count, gpus
    spare = SPARE_CPUS if cluster.local else max(1, cluster.nodes)
    count = resources.actors or max(1, (cluster.cpus - spare) // resources.cpus_per_actor)
    if count * resources.cpus_per_actor >= cluster.cpus:
        raise UserError(
            f"resources: {count} actors of {resources.cpus_per_actor} CPUs leave none of the cluster's "
            f"{cluster.cpus} CPUs for reading images; expected actors × cpus_per_actor to be at most "
            f"{cluster.cpus - 1}, so lower one of them or add CPUs"
        )
    return count, 0.0


def trial_resources(cluster: Cluster, resources: Resources) -> dict[str, float]:
    """CPUs and GPUs of one trial. Raises UserError when no trial fits the cluster."""
    gpus = resources.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if cluster.gpus else 0.0
    if resources.cpus_per_trial > cluster.cpus or gpus > cluster.gpus:
        raise UserError(
            f"resources: a trial of {resources.cpus_per_trial} CPUs and {gpus:g} GPUs does not fit the "
            f"cluster's {cluster.cpus} CPUs and {cluster.gpus} GPUs"
        )
    return {"cpu": resources.cpus_per_trial, "gpu": gpus}


def reserved_memory(cluster: Cluster, wanted: int, what: str) -> int:
    """Bytes that Ray sets apart for work that takes ``wanted``, so that not too much runs side by side.

    Nothing for what is small. Raises UserError where a cluster that was started here never has as much; nodes
    that are to come to others may.
    """
    if wanted < RESERVED_FROM:
        return 0
    if wanted > cluster.memory_bytes and cluster.local:
        raise UserError(
            f"{what} takes {wanted / GIB:.1f} GiB of memory, of which {cluster.memory_bytes / GIB:.1f} are "
            "free beside the object store: expected features.precision: float16, a lower "
            "resources.memory_per_trial_gb, or no grid.target_size as large; or a larger machine"
        )
    return wanted


def concurrent_trials(cluster: Cluster, resources: Resources) -> int | None:
    """How many trials may run at once; None when the cluster's resources alone decide."""
    if resources.concurrent_trials or not cluster.local:
        return resources.concurrent_trials
    return max(1, cluster.cores // resources.cpus_per_trial)


def slots(cluster: Cluster, resources: dict[str, float]) -> int:
    """How many trials of these resources the cluster holds side by side."""
    fits = cluster.cpus // resources["cpu"]
    return max(1, int(min(fits, cluster.gpus / resources["gpu"]) if resources["gpu"] else fits))
