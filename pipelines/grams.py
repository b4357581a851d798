"""Products of training images' features with each other, tap by tap, with which tap kernels begin.

From stored features, a Ray task does some taps: it reads the columns of one after the other. Where none are
stored, an actor takes all training images of a task through the backbone and holds the features of as many
taps as it may, once for each such part of the taps.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import ray

from h2t.device import default_device, fetched, use_threads
from h2t.features import FeatureLayout, keep_features, unit_norm
from h2t.heads.tap_kernels import centred_products
from h2t.methods import METHODS
from pipelines.artifacts import TapToMultiply, backbone_folder, features, grams
from pipelines.cluster import reserved_memory, slots, trial_resources
from pipelines.config import Config, Store
from pipelines.feature_files import open_features
from pipelines.gram_files import gram_table
from pipelines.head_training import LEAST_FLOPS, PROCESS_BYTES
from pipelines.packing import pieces
from pipelines.products import Files, RowFiles, Shard
from pipelines.run_directory import RunDirectory
from pipelines.session import Advance, Session, Step
from pipelines.shard_stream import ImageReader, Seen, process_shards
from pipelines.task_data import Split, TaskData
from pipelines.worker_errors import as_finished, user_error_of


def gram_products(session: Session) -> list[Files]:
    """The products of the stored splits of every task, at every target size, if a method begins with them."""
    if not any(METHODS[name].by_tap for name in session.config.methods):
        return []
    return [
        grams(task, split, size, layout, passes(session, len(task.labels[split])))
        for task in session.tasks.values()
        for split in task.stored_splits
        for size, layout in session.layouts.items()
    ]


def passes(session: Session, n_rows: int) -> list[int]:
    """For each tap, in which forward pass its features are held: as many taps as memory has room for."""
    room = session.config.resources.memory_per_trial_gb * 2**30
    numbers, held = [0], 0.0
    for widths in zip(*(layout.widths for layout in session.layouts.values()), strict=True):
        taken = 4.0 * n_rows * sum(widths)
        new = held > 0 and held + taken > room
        numbers.append(numbers[-1] + new)
        held = taken if new else held + taken
    return numbers[1:]


def _if_stored(session: Session, wanted: Store) -> list[Files]:
    return gram_products(session) if session.config.features.store == wanted else []


def multiply_stored(session: Session, missing: Sequence[TapToMultiply], advance: Advance) -> None:
    """Multiply the stored features of taps, as Ray tasks."""
    cluster, run = session.cluster, session.run
    resources = trial_resources(cluster, session.config.resources)
    groups: dict[tuple[str, Split, int], list[TapToMultiply]] = {}
    for unit in missing:
        groups.setdefault((unit.task, unit.split, unit.target_size), []).append(unit)
    tables = {key: features(session.tasks[key[0]], *key[1:]) for key in groups}
    for table in tables.values():
        table.names(run)  # raises where some are not there

    def width(unit: TapToMultiply) -> int:
        return session.layouts[unit.target_size].widths[unit.tap]

    def flops(unit: TapToMultiply) -> float:
        return 2.0 * unit.n_rows**2 * width(unit)

    pending: dict[ray.ObjectRef, list[TapToMultiply]] = {}
    for part in pieces(groups.values(), flops, slots(cluster, resources), per_slot=2, least=LEAST_FLOPS):
        first = part[0]
        wanted = 4 * first.n_rows * (3 * max(map(width, part)) + 2 * first.n_rows) + PROCESS_BYTES
        what = f"{first.task}: multiplying a tap's features at target size {first.target_size}"
        options = multiply.options(
            num_cpus=resources["cpu"],
            num_gpus=resources["gpu"],
            memory=reserved_memory(cluster, wanted, what),
        )
        table = tables[first.task, first.split, first.target_size]
        pending[options.remote(session.tasks[first.task], part, table, run)] = part
    for part in as_finished(pending, "multiplied features"):
        advance(len(part), part[0].task)


@ray.remote(max_retries=2, max_calls=1)
def multiply(task: TaskData, units: Sequence[TapToMultiply], table: RowFiles, run: RunDirectory) -> str:
    """Write the products of some taps of a table; the text of a user's mistake, if there is one."""

    def work() -> None:
        use_threads(task.config.resources.cpus_per_trial)
        stored = open_features(run, table.names(run))
        for unit in units:
            columns = np.arange(*stored.layout.offsets[[unit.tap, unit.tap + 1]])
            values = keep_features(stored.values, stored.layout, columns)
            _write(run, task, unit, stored.layout.taps[unit.tap], values, stored.index)

    return user_error_of(work)


def _write(
    run: RunDirectory, task: TaskData, unit: TapToMultiply, tap: str, values: np.ndarray, index: np.ndarray
) -> None:
    """Write the products of a tap's features float32 [n, width], of unit norm, which are written over."""
    products = centred_products(values, default_device())
    keys = backbone_folder(task.config), unit.task, unit.split, unit.target_size
    labels = task.labels[unit.split][index]
    run.write_table(unit.file, gram_table(keys, tap, products, index, labels))


def multiply_images(session: Session, missing: Sequence[TapToMultiply], advance: Advance) -> None:
    """Multiply features that are stored nowhere: a pass over a task's images for each part of the taps."""
    by_pass: dict[tuple[str, Split, int], list[TapToMultiply]] = {}
    for unit in missing:
        by_pass.setdefault((unit.task, unit.split, unit.forward_pass), []).append(unit)
    shards = [
        Shard(task, split, 0, units[0].n_rows, tuple((unit, unit.file) for unit in units))
        for (task, split, _), units in by_pass.items()
    ]
    make_step = partial(ProductsWriter, session.run, session.config)
    memory = max((_held(session, shard) for shard in shards), default=0)
    what = "multiplying features that are stored nowhere"
    process_shards(session, shards, make_step, advance, reserved_memory(session.cluster, memory, what))


def _held(session: Session, shard: Shard) -> int:
    """Bytes that an actor takes: the features of the taps, a copy of the widest, two products, a process."""
    widths = [session.layouts[unit.target_size].widths[unit.tap] for unit, _ in shard.files]
    n_rows = len(shard.indices)
    return 4 * n_rows * (sum(widths) + 2 * max(widths)) + 8 * n_rows**2 + PROCESS_BYTES


def count_images(units: Sequence[TapToMultiply]) -> int:
    """Images that go through the backbone, each as often as it does."""
    return sum({(unit.task, unit.split, unit.forward_pass): unit.n_rows for unit in units}.values())


class ProductsWriter:
    """Step of an actor: all images of a split to the products of some taps."""

    def __init__(self, run: RunDirectory, config: Config) -> None:
        self.run, self.images = run, ImageReader(config)

    def __call__(
        self, task: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray, seen: Seen
    ) -> None:
        """Write the products of the shard's taps, whose features of all images are held meanwhile."""
        units = {(unit.target_size, unit.tap): unit for unit, _ in shard.files}
        values: dict[tuple[int, int], np.ndarray] = {}
        taps, sizes = sorted({tap for _, tap in units}), sorted({size for size, _ in units})
        for rows, pooled in self.images.read(images, taps, sizes, seen):
            for key, part in zip(units, fetched([pooled[key] for key in units]), strict=True):
                if key not in values:
                    values[key] = np.empty((len(images), part.shape[1]), np.float32)
                values[key][rows] = part
        for (size, tap), unit in units.items():
            matrix, name = values.pop((size, tap)), self.images.backbone.taps[tap].name
            unit_norm(matrix, FeatureLayout((name,), matrix.shape[1:]), out=matrix)
            _write(self.run, task, unit, name, matrix, index)


STEPS = (
    Step("products", "taps", partial(_if_stored, wanted="features"), multiply_stored),
    Step("products", "images", partial(_if_stored, wanted="gram"), multiply_images, count_images),
)
