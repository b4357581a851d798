"""One Ray Data pipeline: shards of images, decoded on CPU workers, into a fixed pool of actors.

A decoding task reads encoded bytes, pixels of bounded size travel from there to the actor, and one small row
comes back. The actor writes its results itself, so nothing large passes the object store.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from queue import Empty, Queue
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext

from h2t.backbones.tap_reader import TapReader
from h2t.device import default_device, use_threads
from h2t.errors import UserError
from h2t.images.preprocessing import Preprocessing, prepare, to_batch
from h2t.images.source import BadImage, BadRow, Image
from pipelines.artifacts import backbone_folder, bad_rows_file, write_rows
from pipelines.backbone import load, preprocessing_of
from pipelines.cluster import Cluster, backbone_actors
from pipelines.config import Config, Resources
from pipelines.connection import POOL_NOISE, without_line
from pipelines.products import Gap, Shard, count_rows, shards
from pipelines.schemas import BAD_ROWS
from pipelines.session import Advance, Session
from pipelines.task_data import Split, TaskData, refuse_bad_rows
from pipelines.worker_errors import raise_user_error, user_error_of

READ_AT_ONCE = 16  # images: as many as an object store is asked for side by side
# The fields of BadRow; the backbone is added when they are written.
BAD_ROW = pa.struct([field for field in BAD_ROWS if field.name != "backbone"])


SHARDS_PER_ACTOR = 4
Seen = Callable[[int], None]
LOOKED_EVERY_S = 2.0
LIVES = 3  # workers that a shard may take with it; Ray by itself would start another one for ever


class ShardStep(Protocol):
    """The part of a stage that an actor does: from a decoded shard to files."""

    def __call__(
        self, task: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray, seen: Seen
    ) -> None:
        """Write the shard's files from its images, as ``prepare`` leaves them, and their indices int32.

        ``seen`` is told how many images are done, batch by batch.
        """
        ...


def shards_for(session: Session, gaps: Sequence[Gap]) -> list[Shard]:
    """Cut gaps for the actors of the cluster: ``resources.shard_size`` rows, or fewer where actors are many.

    Fewer than one forward pass takes would waste it.
    """
    resources = session.config.resources
    actors, _ = backbone_actors(session.cluster, resources)
    if actors == 1:
        return shards(gaps, resources.shard_size)
    share = math.ceil(count_rows(gaps) / (actors * SHARDS_PER_ACTOR))
    return shards(gaps, min(resources.shard_size, max(share, resources.images_per_forward)))


def process_shards(
    session: Session,
    shards: Sequence[Shard],
    make_step: Callable[[], ShardStep],
    advance: Advance,
    memory: int = 0,
) -> None:
    """Take every shard through a step in the actors; ``memory``: bytes that are set apart for each.

    Raises UserError when nothing moves, and one that lists the images that can't be read, where the recipe
    refuses those.
    """
    bad: list[BadRow] = []
    deadly: list[str] = []
    _ = session.cluster  # else the first actor would start a Ray of its own
    counter = ImageCounter.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    with CountedImages(counter, shards, advance) as counted:
        rows = stream_shards(session, shards, make_step, counter, memory)
        for row in watched(rows, counted, session.config, partial(others_hold_devices, session)):
            if row["deadly"]:
                deadly.append(row["deadly"])
                continue
            raise_user_error([row["user_error"]])
            bad += [BadRow(**problem) for problem in row["bad"]]
            counted.finish(f"{row['task']}/{row['split']}", row["n_images"] + len(row["bad"]))
    if deadly:
        raise UserError(
            f"{len(deadly)} of {len(shards)} shards took {LIVES} workers with them, such as {deadly[0]}; the "
            "others are done. If memory ran out: lower resources.images_per_forward, resources.shard_size or "
            "resources.actors; else an image there may be what kills the reader: on_bad_image: skip will not "
            "help, take it out"
        )
    if session.config.on_bad_image == "refuse":
        refuse_bad_rows(bad)
    elif bad:
        session.console.print(f"{len(bad)} bad images left out, such as {bad[0].path}: {bad[0].reason}")


@ray.remote
class ImageCounter:
    """How many images of every task and split the actors have done: a slow shard is seen to move.

    ``moves`` counts whatever happens: images that are read or done, and workers that begin; ``actors``: those
    that were started.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.moves = self.actors = 0
        self.begun: Counter[int] = Counter()

    def start(self) -> None:
        """Count an actor that starts."""
        self.moves += 1
        self.actors += 1

    def begin(self, shard: int) -> int:
        """Count a worker that begins a shard; which one it is."""
        self.moves += 1
        self.begun[shard] += 1
        return self.begun[shard]

    def add(self, place: str, count: int) -> None:
        """Count images that are done."""
        self.moves += 1
        self.counts[place] = self.counts.get(place, 0) + count

    def move(self) -> None:
        """Count images that are read."""
        self.moves += 1

    def read(self) -> tuple[dict[str, int], int, int]:
        """What was counted so far."""
        return self.counts, self.moves, self.actors


class CountedImages:
    """Tells ``advance`` of images as they are done and not shard by shard; a context manager.

    A shard that is done again after its worker's death counts once.
    """

    def __init__(self, counter: ray.actor.ActorHandle, shards: Sequence[Shard], advance: Advance) -> None:
        self.counter, self.advance, self.lock = counter, advance, threading.Lock()
        self.told: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.total: Counter[str] = Counter()
        for shard in shards:
            self.total[f"{shard.task}/{shard.split}"] += len(shard.indices)
        self.moves, self.moved, self.actors = 0, time.monotonic(), 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "CountedImages":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        ray.kill(self.counter)

    def finish(self, place: str, count: int) -> None:
        """Count the images of a shard that is done."""
        self.finished[place] += count
        self.moved = time.monotonic()
        self._tell(place, self.finished[place])

    def _tell(self, place: str, count: int) -> None:
        with self.lock:
            new = min(count, self.total[place]) - self.told[place]
            if new > 0:
                self.told[place] += new
                self.advance(new, place)

    def _look(self) -> None:
        while not self.ended.wait(LOOKED_EVERY_S):
            with suppress(ray.exceptions.RayError):
                counts, moves, self.actors = ray.get(self.counter.read.remote(), timeout=LOOKED_EVERY_S)
                if moves != self.moves:
                    self.moves, self.moved = moves, time.monotonic()
                for place, count in counts.items():
                    self._tell(place, count)


def others_hold_devices(session: Session) -> bool:
    """Whether there is no device for an actor, on a cluster that other runs use too."""
    _, gpus = backbone_actors(session.cluster, session.config.resources)
    kind, needed = ("GPU", gpus) if gpus else ("CPU", session.config.resources.cpus_per_actor)
    return not session.cluster.local and ray.available_resources().get(kind, 0.0) < needed


def watched(
    rows: Iterator[dict[str, Any]],
    counted: CountedImages,
    config: Config,
    waits: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """The rows, as long as images are read or computed: slow is not stuck, nor is who waits for a device.

    ``waits``: whether others hold the devices; it is asked while no actor has started.

    Raises UserError where nothing of that has happened for the time that the recipe sets.
    """
    taken: Queue[dict[str, Any] | BaseException | None] = Queue()

    def take() -> None:
        try:
            for row in rows:
                taken.put(row)
            taken.put(None)
        except BaseException as error:  # for the thread that waits
            taken.put(error)

    threading.Thread(target=take, daemon=True).start()
    limit = config.resources.no_progress_timeout_s
    while True:
        try:
            item = taken.get(timeout=LOOKED_EVERY_S)
        except Empty:
            if time.monotonic() - counted.moved <= limit:
                continue
            if not counted.actors and waits():
                counted.moved = time.monotonic()
                continue
            done = f"{sum(counted.told.values())} of {sum(counted.total.values())} images are done"
            raise UserError(
                f"no image was read or computed for {limit:.0f} s; {done}, what is done is kept. The cluster "
                "is too small or busy, or its storage does not answer: see `h2t doctor`; or raise "
                "resources.no_progress_timeout_s"
            ) from None
        if item is None:
            return
        if isinstance(item, BaseException):
            raise item
        yield item


def stream_shards(
    session: Session,
    shards: Sequence[Shard],
    make_step: Callable[[], ShardStep],
    counter: ray.actor.ActorHandle | None = None,
    memory: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each shard as it is done, in any order: task, split, n_images, bad, user_error."""
    config = session.config
    count, gpus = backbone_actors(session.cluster, config.resources)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # which knows whole shards alone: see `watched`
    rows = [{"shard": number} for number in range(len(shards))]
    # By reference: what is larger than a few kilobytes does not belong into the arguments of every task.
    shared = ray.put({
        "counter": counter, "shards": list(shards), "tasks": dict(session.tasks), "run": session.run,
        "preprocessing": preprocessing_of(config.backbone),
        # Named here: a worker may not see all that their key depends on.
        "bad_rows_files": [bad_rows_file(session.tasks[shard.task], shard) for shard in shards],
    })  # fmt: skip
    pipeline = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            decode_shard, batch_size=1, batch_format="pyarrow", fn_kwargs={"shared": [shared]}, num_cpus=1
        )
        .map_batches(
            ShardActor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"shared": [shared], "make_step": make_step},
            compute=actor_pool(session.cluster, config.resources, count, len(shards), memory),
            memory=memory or None,
            num_gpus=gpus or None,
            num_cpus=None if gpus else config.resources.cpus_per_actor,
        )
    )
    rows_done = iter(pipeline.iter_rows())
    with without_line(POOL_NOISE):  # said when the actors start
        first = next(rows_done)
    yield first
    yield from rows_done


def actor_pool(
    cluster: Cluster, resources: Resources, count: int, n_units: int, memory: int = 0
) -> ActorPoolStrategy:
    """``count`` actors at once, or as many as there is work for; of much memory, as many as it is there for.

    On a cluster whose recipe states no number, nodes that join it get actors as well.
    """
    start = min(count, n_units)
    if memory:
        return ActorPoolStrategy(min_size=1, max_size=start)
    if cluster.local or resources.actors:
        return ActorPoolStrategy(size=start)
    return ActorPoolStrategy(min_size=start, max_size=n_units)


class ShardActor:
    """Actor: a decoded shard in, handed to the step of a stage, one small row out."""

    def __init__(self, shared: list[ray.ObjectRef], make_step: Callable[[], ShardStep]) -> None:
        self.shared, self.make_step = ray.get(shared[0]), make_step
        if self.shared["counter"]:
            self.shared["counter"].start.remote()
        self.user_error = user_error_of(self._start)

    def _start(self) -> None:
        self.step = self.make_step()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Do the step, unless the recipe refuses bad rows and the shard has some."""
        number = batch["shard"][0].as_py()
        shard: Shard = self.shared["shards"][number]
        task: TaskData = self.shared["tasks"][shard.task]
        counter, place = self.shared["counter"], f"{shard.task}/{shard.split}"
        if counter and ray.get(counter.begin.remote(number)) > LIVES:
            return self._row(shard, deadly=f"rows {shard.start} to {shard.stop - 1} of {place}")
        user_error = self.user_error or batch["user_error"][0].as_py()
        images, index = decoded_images(batch)
        bad = batch["bad"][0].as_py()

        def seen(count: int) -> None:
            if counter:
                counter.add.remote(place, count)

        def work() -> None:
            if bad:
                rows = [{**row, "backbone": backbone_folder(task.config)} for row in bad]
                write_rows(self.shared["run"], self.shared["bad_rows_files"][number], BAD_ROWS, rows)
            self.step(task, shard, images, index, seen)

        if not user_error and (not bad or task.config.on_bad_image == "skip"):
            user_error = user_error_of(work)
        return self._row(shard, n_images=len(images), bad=bad, user_error=user_error)

    def _row(self, shard: Shard, **said: Any) -> pa.Table:
        """What the driver is told of a shard."""
        row = {
            "task": shard.task,
            "split": shard.split,
            "n_images": 0,
            "bad": [],
            "user_error": "",
            "deadly": "",
        }
        return pa.Table.from_pylist([row | said])


def decode_shard(batch: pa.Table, shared: list[ray.ObjectRef]) -> pa.Table:
    """Read and decode one shard: images back to back, height, width and type of each, bad rows."""
    known = ray.get(shared[0])
    number = batch["shard"][0].as_py()
    shard: Shard = known["shards"][number]
    pixels: list[np.ndarray] = []
    kept: list[int] = []
    bad: list[BadRow] = []
    user_error = user_error_of(
        lambda: _decode(
            shard, known["tasks"][shard.task], known["preprocessing"], pixels, kept, bad, known["counter"]
        )
    )
    parts = [image.reshape(-1).view(np.uint8) for image in pixels]
    flat = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    return pa.table(
        {
            "shard": [number],
            "pixels": pa.array([flat.data], pa.large_binary()),
            "index": pa.array([kept], pa.list_(pa.int32())),
            "height": pa.array([[image.shape[0] for image in pixels]], pa.list_(pa.int32())),
            "width": pa.array([[image.shape[1] for image in pixels]], pa.list_(pa.int32())),
            "type": pa.array([[image.dtype.str for image in pixels]], pa.list_(pa.string())),
            "bad": pa.array([[asdict(row) for row in bad]], pa.list_(BAD_ROW)),
            "user_error": [user_error],
        }
    )


def _decode(
    shard: Shard,
    task: TaskData,
    preprocessing: Preprocessing,
    pixels: list[np.ndarray],
    kept: list[int],
    bad: list[BadRow],
    counter: ray.actor.ActorHandle | None,
) -> None:
    """Fill the lists with images, their indices, and the rows that are bad."""
    bad += [row for row in task.bad_rows if row.split == shard.split and row.index in shard.indices]
    usable = sorted(set(shard.indices) - {row.index for row in bad})
    for number, (index, image) in enumerate(read_in_turn(task, shard.split, usable)):
        if counter and number % READ_AT_ONCE == 0:
            counter.move.remote()
        try:
            pixels.append(np.ascontiguousarray(prepare(image, preprocessing)))
            kept.append(index)
        except BadImage as error:
            bad.append(BadRow(shard.task, shard.split, index, error.path, error.reason))


def read_in_turn(task: TaskData, split: Split, rows: Sequence[int]) -> Iterator[tuple[int, Image]]:
    """Rows and their images, few of them in memory at once: photographs are large even as stored."""
    for start in range(0, len(rows), READ_AT_ONCE):
        some = rows[start : start + READ_AT_ONCE]
        yield from zip(some, task.read(split, some), strict=True)


def decoded_images(batch: pa.Table) -> tuple[list[np.ndarray], np.ndarray]:
    """The images of a decoded shard as ``prepare`` left them (read-only views), and their indices int32."""
    data = np.frombuffer(batch["pixels"][0].as_buffer(), np.uint8)
    images, start = [], 0
    for height, width, kind in zip(
        *(batch[name][0].as_py() for name in ("height", "width", "type")), strict=True
    ):
        stop = start + height * width * 3 * np.dtype(kind).itemsize
        images.append(data[start:stop].view(kind).reshape(height, width, 3))
        start = stop
    return images, np.asarray(batch["index"][0].as_py(), np.int32)


class ImageReader:
    """A backbone on one device, whose taps are read some at a time; state of an actor."""

    def __init__(self, config: Config) -> None:
        use_threads(config.resources.cpus_per_actor)
        self.config, self.device = config, default_device()
        self.backbone = load(config.backbone, self.device)
        self.preprocessing = preprocessing_of(config.backbone)

    def read(
        self, images: list[np.ndarray], taps: Sequence[int], target_sizes: Sequence[int], seen: Seen
    ) -> Iterator[tuple[slice, dict[tuple[int, int], torch.Tensor]]]:
        """Of each batch of images its rows, and by target size and tap the features float32 [b, width].

        ``seen`` is told of each batch.
        """
        part, start = self.backbone.only([self.backbone.taps[tap].name for tap in taps]), 0
        with TapReader(part, target_sizes, self.config.backbone.aggregation) as reader:
            for pooled in self.batches(reader, images, seen):
                keyed = {(size, tap): value for size, values in pooled.items()
                         for tap, value in zip(taps, values, strict=True)}  # fmt: skip
                stop = start + len(next(iter(keyed.values())))
                yield slice(start, stop), keyed
                start = stop

    def batches(
        self, reader: TapReader, images: list[np.ndarray], seen: Seen
    ) -> Iterator[dict[int, list[torch.Tensor]]]:
        """What a reader gives of each batch of images, of which ``seen`` is told."""
        at_once = self.config.resources.images_per_forward
        for start in range(0, len(images), at_once):
            chunk = images[start : start + at_once]
            yield reader(to_batch(chunk, self.preprocessing, self.device))
            seen(len(chunk))


class FeatureReader(ImageReader):
    """One that reads all taps; its hooks stay, and what is compiled is compiled once."""

    def __init__(self, config: Config, target_sizes: Sequence[int]) -> None:
        super().__init__(config)
        self.taps = TapReader(
            self.backbone, target_sizes, config.backbone.aggregation, compiled=config.resources.compile
        )

    def read_all(self, images: list[np.ndarray], seen: Seen) -> Iterator[dict[int, list[torch.Tensor]]]:
        """Features of each batch of images: per target size, one float32 [b, width] per tap.

        ``seen`` is told of each batch.
        """
        return self.batches(self.taps, images, seen)
