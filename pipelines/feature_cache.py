"""Feature matrices in Ray's object store: loaded once, read zero-copy by every trial of a node."""

from collections import OrderedDict
from collections.abc import Sequence

import ray

from h2t.errors import UserError
from pipelines.feature_files import FeatureMatrix, read_features
from pipelines.run_directory import RunDirectory

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


@ray.remote
def _load(run: RunDirectory, names: Sequence[str]) -> FeatureMatrix:
    return read_features(run, names)


@ray.remote
class FeatureCache:
    """Actor that holds references to the matrices in use, so that each is read from disk once.

    ``files``: the feature files of each (task, target size); ``kept``: how many matrices stay.
    """

    def __init__(self, run: RunDirectory, files: dict[tuple[str, int], list[str]], kept: int) -> None:
        self.run, self.files, self.kept = run, files, kept
        self.matrices: OrderedDict[tuple[str, int], ray.ObjectRef] = OrderedDict()

    def get(self, task: str, target_size: int) -> list[ray.ObjectRef]:
        """A list with the reference of one matrix; reading starts with the first request."""
        key = task, target_size
        if key not in self.matrices:
            self.matrices[key] = _load.options(num_cpus=0).remote(self.run, self.files[key])
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
