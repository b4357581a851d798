"""One Ray Data pipeline: shards of images, decoded on CPU workers, into a fixed pool of actors.

What travels: encoded bytes until the decoding task, uint8 pixels from there to the actor, one small
manifest row back. What an actor computes it writes itself, so nothing large passes the object store.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError
from rich.console import Console

from h2t.errors import UserError
from h2t.images.preprocessing import Preprocessing, prepare
from h2t.images.source import BadImage, BadRow
from pipelines.backbone_actor import load, manifest_row, preprocessing_of, write_bad_rows
from pipelines.cluster import POOL_NOISE, Cluster, backbone_actors, without_lines
from pipelines.config import Config
from pipelines.progress import StageProgress
from pipelines.run_directory import RunDirectory
from pipelines.task_data import Shard, TaskData, refuse_bad_rows

BAD_ROW = pa.struct(
    [
        ("task", pa.string()),
        ("split", pa.string()),
        ("index", pa.int32()),
        ("path", pa.string()),
        ("reason", pa.string()),
    ]
)


def stream_shards(
    shards: Sequence[Shard],
    works: Sequence[TaskData],
    preprocessing: Preprocessing,
    actor: Callable[..., Any],
    arguments: dict[str, Any],
    config: Config,
    cluster: Cluster,
) -> Iterator[dict[str, Any]]:
    """Yield the manifest row of each shard as it is done, in any order.

    ``actor`` is a class made with ``arguments``; its instances map one decoded shard (a table of one row,
    see :func:`decode_shard`) to a table of one manifest row. Raises UserError when nothing moves.
    """
    count, gpus = backbone_actors(cluster, config.resources)
    count = min(count, len(shards))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = config.resources.no_progress_timeout_s
    rows = [{"shard": number} for number in range(len(shards))]
    # By reference: what is larger than a few kilobytes does not belong into the arguments of every task.
    common = ray.put(
        {"shards": list(shards), "works": {w.task.name: w for w in works}, "preprocessing": preprocessing}
    )
    pipeline = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            decode_shard, batch_size=1, batch_format="pyarrow", fn_kwargs={"common": [common]}, num_cpus=1
        )
        .map_batches(
            actor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"common": [common], **arguments},
            compute=ActorPoolStrategy(size=count),
            num_gpus=gpus or None,
            num_cpus=None if gpus else config.resources.cpus_per_actor,
        )
    )
    rows_done = _clear_errors(pipeline.iter_rows(), config)
    with without_lines(POOL_NOISE):  # said when the actors start
        first = next(rows_done)
    yield first
    yield from rows_done


def process_shards(
    stage: str,
    shards: Sequence[Shard],
    works: Sequence[TaskData],
    run: RunDirectory,
    step: Callable[..., Any],
    arguments: dict[str, Any],
    config: Config,
    cluster: Cluster,
    console: Console,
) -> int:
    """Take every shard through ``step`` in the actors, with progress; how many images that were.

    ``step`` is a class made in each actor with ``arguments``; its instances are called with (work, shard,
    images uint8 [height, width, 3] each, their indices int32 [n]) and write what comes of them. Raises
    UserError that lists the images that can't be read, where the recipe refuses those.
    """
    preprocessing = preprocessing_of(config.backbone, load(config.backbone))
    parts = {"run": run, "step": step, "arguments": arguments}
    n_images, bad = 0, []
    with StageProgress(console, stage, sum(len(shard.indices) for shard in shards), "images") as progress:
        for row in stream_shards(shards, works, preprocessing, ShardActor, parts, config, cluster):
            if row["mistake"]:
                raise UserError(row["mistake"])
            n_images += row["n_images"]
            bad += row["bad"]
            progress.advance(row["n_images"] + len(row["bad"]), f"{row['task']}/{row['split']}")
    if config.on_bad_image == "refuse":
        refuse_bad_rows(BadRow(**row) for row in bad)
    return n_images


class ShardActor:
    """Actor: a decoded shard in, handed to the step of a stage, one manifest row out.

    A user's mistake that only this node can see (no weights there, say) travels in the row: through Ray
    Data an exception would lose its type and its cause.
    """

    def __init__(
        self,
        common: list[ray.ObjectRef],
        run: RunDirectory,
        step: Callable[..., Any],
        arguments: dict[str, Any],
    ) -> None:
        known = ray.get(common[0])
        self.run, self.shards, self.works = run, known["shards"], known["works"]
        self.step: Any = None
        self.mistake = ""
        try:
            self.step = step(**arguments)
        except UserError as error:
            self.mistake = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Do the step, unless the recipe refuses bad rows and the shard has some."""
        shard = self.shards[batch["shard"][0].as_py()]
        mistake = self.mistake or batch["mistake"][0].as_py()
        if mistake:
            return manifest_row(shard, 0, [], mistake)
        work = self.works[shard.task]
        images, index = decoded_images(batch)
        bad = write_bad_rows(self.run, work, shard, batch)
        if bad and work.config.on_bad_image == "refuse":
            return manifest_row(shard, 0, bad)
        try:
            self.step(work, shard, images, index)
        except UserError as error:
            return manifest_row(shard, 0, bad, str(error))
        return manifest_row(shard, len(images), bad)


def _clear_errors(rows: Iterable[dict[str, Any]], config: Config) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except ray.data.exceptions.ExecutionTimeoutError:
        seconds = config.resources.no_progress_timeout_s
        raise UserError(
            f"no shard moved for {seconds:.0f} s: the cluster is too small or busy, or one shard of "
            f"{config.resources.shard_size} images takes longer than that; lower resources.shard_size or "
            "resources.actors, or raise resources.no_progress_timeout_s"
        ) from None
    except RayError as error:
        raise user_cause(error) from error


def user_cause(error: BaseException) -> BaseException:
    """The user's mistake inside a Ray error, where there is one; else the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return UserError(str(getattr(cause, "cause", cause)))
        cause = getattr(cause, "cause", None) or cause.__cause__
    return error


def decode_shard(batch: pa.Table, common: list[ray.ObjectRef]) -> pa.Table:
    """Read and decode one shard: pixels uint8 back to back, the height and width of each image, bad rows."""
    known = ray.get(common[0])
    number = batch["shard"][0].as_py()
    shard = known["shards"][number]
    try:
        return _decoded(number, shard, known["works"][shard.task], known["preprocessing"])
    except UserError as error:
        return _decoded_table(number, [], [], [], str(error))


def _decoded(number: int, shard: Shard, work: TaskData, preprocessing: Preprocessing) -> pa.Table:
    bad = [row for row in work.bad_rows if row.split == shard.split and row.index in shard.indices]
    usable = sorted(set(shard.indices) - {row.index for row in bad})
    pixels, kept = [], []
    for index, image in zip(usable, work.read(shard.split, usable), strict=True):
        try:
            pixels.append(np.ascontiguousarray(prepare(image, preprocessing)))
            kept.append(index)
        except BadImage as error:
            bad.append(BadRow(shard.task, shard.split, index, error.path, error.reason))
    return _decoded_table(number, pixels, kept, bad, "")


def _decoded_table(
    number: int, pixels: list[np.ndarray], kept: list[int], bad: list[BadRow], mistake: str
) -> pa.Table:
    flat = np.concatenate([image.reshape(-1) for image in pixels]) if pixels else np.empty(0, np.uint8)
    return pa.table(
        {
            "shard": [number],
            "pixels": pa.array([flat.data], pa.large_binary()),
            "index": pa.array([kept], pa.list_(pa.int32())),
            "height": pa.array([[image.shape[0] for image in pixels]], pa.list_(pa.int32())),
            "width": pa.array([[image.shape[1] for image in pixels]], pa.list_(pa.int32())),
            "bad": pa.array([[asdict(row) for row in bad]], pa.list_(BAD_ROW)),
            "mistake": [mistake],
        }
    )


def decoded_images(batch: pa.Table) -> tuple[list[np.ndarray], np.ndarray]:
    """The images of a decoded shard, uint8 [height, width, 3] (read-only views), and their indices int32."""
    data = np.frombuffer(batch["pixels"][0].as_buffer(), np.uint8)
    heights, widths = batch["height"][0].as_py(), batch["width"][0].as_py()
    ends = np.cumsum([h * w * 3 for h, w in zip(heights, widths, strict=True)], dtype=np.int64)
    images = [
        data[end - h * w * 3 : end].reshape(h, w, 3)
        for end, h, w in zip(ends.tolist(), heights, widths, strict=True)
    ]
    return images, np.asarray(batch["index"][0].as_py(), np.int32)
