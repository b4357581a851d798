"""Feature matrices in Ray's object store: loaded once, read zero-copy by every trial of a node."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from h2t.errors import UserError
from pipelines.connection import checked_folder
from pipelines.feature_files import FeatureMatrix, read_features
from pipelines.products import RowFiles
from pipelines.run_directory import RunDirectory
from pipelines.session import Session

KEPT = 2  # matrices that stay while no trial holds them; trials run ordered by task and target size


def matrices_kept(largest: int, store_bytes: int) -> int:
    """How many matrices may stay in an object store of that size.

    Raises UserError where it has no room for one: Ray would move it to a disk and back without a word.
    """
    if largest > 0.95 * store_bytes:
        raise UserError(
            f"the largest feature matrix takes {largest / 2**30:.1f} GiB, the object store has "
            f"{store_bytes / 2**30:.1f}: start Ray with a larger one (ray start --object-store-memory; in a "
            "container, --shm-size as well), or leave out the largest grid.target_size"
        )
    return max(1, min(KEPT, int(0.95 * store_bytes // max(largest, 1))))


@contextmanager
def feature_cache(
    session: Session, tables: Mapping[tuple[str, int], RowFiles]
) -> Iterator[ray.actor.ActorHandle]:
    """A :class:`FeatureCache` of the features of each (task, target size), for as long as it is needed.

    Raises UserError where the object store that was started here has no room for a matrix.
    """
    largest = max((session.matrix_bytes[size] for _, size in tables), default=0)
    try:
        kept = matrices_kept(largest, session.cluster.store_bytes)
    except UserError as error:
        if session.cluster.local:
            raise
        kept = 1
        session.console.print(f"{error}; nodes that are to come may have larger ones")
    if session.cluster.local and kept < min(KEPT, len(tables)):
        checked_folder(largest, "one feature matrix waits on a disk while another is used")
    cache = FeatureCache.options(num_cpus=0).remote(session.run, dict(tables), kept)  # type: ignore[attr-defined]
    try:
        yield cache
    finally:
        ray.kill(cache)


@ray.remote
def _load(run: RunDirectory, table: RowFiles) -> FeatureMatrix:
    return read_features(run, table.names(run))


@ray.remote
class FeatureCache:
    """Actor that holds references to the matrices in use, so that each is read from disk once.

    ``tables``: the features of each (task, target size); ``kept``: how many matrices stay.
    """

    def __init__(self, run: RunDirectory, tables: dict[tuple[str, int], RowFiles], kept: int) -> None:
        self.run, self.tables, self.kept = run, tables, kept
        self.matrices: OrderedDict[tuple[str, int], ray.ObjectRef] = OrderedDict()

    def get(self, task: str, target_size: int) -> list[ray.ObjectRef]:
        """A list with the reference of one matrix; reading starts with the first request."""
        key = task, target_size
        if key not in self.matrices:
            self.matrices[key] = _load.options(num_cpus=0).remote(self.run, self.tables[key])
        self.matrices.move_to_end(key)
        while len(self.matrices) > self.kept:
            self.matrices.popitem(last=False)
        return [self.matrices[key]]


def cached_features(cache: ray.actor.ActorHandle, task: str, target_size: int) -> FeatureMatrix:
    """The features of a task's folds; the arrays are shared with other processes and must not be written.

    Raises UserError that names a damaged file.
    """
    try:
        return ray.get(ray.get(cache.get.remote(task, target_size))[0])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):  # whose own text the wrapper hides behind a traceback
            raise UserError(str(error.cause)) from None
        raise
