"""Feature matrices in Ray's object store: loaded once, read zero-copy by every trial of a node."""

from collections import OrderedDict
from collections.abc import Sequence

import ray

from pipelines.feature_files import FeatureMatrix, read_features
from pipelines.run_directory import RunDirectory

KEPT = 2  # matrices that stay while no trial holds them; trials run ordered by task and target size


@ray.remote
def _load(run: RunDirectory, names: Sequence[str]) -> FeatureMatrix:
    return read_features(run, names)


@ray.remote
class FeatureCache:
    """Actor that holds references to the matrices in use, so that each is read from disk once.

    ``files``: the feature files of each (task, target size).
    """

    def __init__(self, run: RunDirectory, files: dict[tuple[str, int], list[str]]) -> None:
        self.run, self.files = run, files
        self.matrices: OrderedDict[tuple[str, int], ray.ObjectRef] = OrderedDict()

    def get(self, task: str, target_size: int) -> list[ray.ObjectRef]:
        """A list with the reference of one matrix; reading starts with the first request."""
        key = task, target_size
        if key not in self.matrices:
            self.matrices[key] = _load.options(num_cpus=0).remote(self.run, self.files[key])
        self.matrices.move_to_end(key)
        while len(self.matrices) > KEPT:
            self.matrices.popitem(last=False)
        return [self.matrices[key]]


def cached_features(cache: ray.actor.ActorHandle, task: str, target_size: int) -> FeatureMatrix:
    """The features of a task's folds; the arrays are shared with other processes and must not be written."""
    return ray.get(ray.get(cache.get.remote(task, target_size))[0])
