"""Predictions for more images than one process should read: Ray Data, a Parquet file for every part of them.

The folder of predictions holds a file for each part, named after what it depends on: a run that was stopped
goes on with the parts that lack, and other adapters or images make other files.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import ray
from ray.data import DataContext
from rich.console import Console

from h2t.adapter import class_names
from h2t.images.remote import open_root
from h2t.images.unlabelled import ImageFiles
from pipelines.cluster import backbone_actors
from pipelines.config import Resources, fingerprint
from pipelines.connection import connect
from pipelines.predict import Named, Predictor, load_adapters, predictions
from pipelines.progress import StageProgress
from pipelines.run_directory import RunDirectory
from pipelines.shard_stream import actor_pool
from pipelines.worker_errors import raise_user_error, user_error_of

PART = 1000
"""Images of a part, as far as they are files; a Parquet file is a part by itself."""


@dataclass(frozen=True)
class Part:
    """Images that one worker predicts, and the file that its rows go to."""

    images: ImageFiles
    file: str


def parts(
    found: Sequence[ImageFiles], adapters: Sequence[str], top: int, folder: str, size: int = PART
) -> Iterator[Part]:
    """The parts of images; the name of a part's file changes with adapters, ``top``, paths and sizes."""
    digests = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in adapters]
    number = 0
    for files in found:
        filesystem, _ = open_root(files.root)
        several = 1 if files.tables else size
        for start in range(0, len(files.paths), several):
            paths = files.paths[start : start + several]
            sizes = [info.size for info in filesystem.get_file_info(list(paths))]
            key = fingerprint(digests, top, paths, sizes)
            n_images = files.n_images // len(files.paths) if files.tables else len(paths)
            yield Part(
                replace(files, paths=paths, n_images=n_images), f"{folder}/part-{number:05}-{key}.parquet"
            )
            number += 1


class PartPredictor:
    """Actor: adapters that are loaded once; a part in, its rows in a file, what could not be read out."""

    def __init__(self, files: Sequence[str], top: int, batch_size: int, run: RunDirectory) -> None:
        self.top, self.batch_size, self.run = top, batch_size, run
        self.adapters: list[Named] = []
        self.error = user_error_of(lambda: self.adapters.extend(load_adapters(files)))
        self.predictor = Predictor(self.adapters)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Predict a part."""
        (part,) = batch["part"]
        bad: list[str] = []
        error = self.error or user_error_of(lambda: self._predict(part, bad))
        return {"n_images": [part.images.n_images], "bad": [bad], "user_error": [error]}

    def _predict(self, part: Part, bad: list[str]) -> None:
        rows = []
        for some, unreadable, _ in predictions(self.predictor, part.images, self.top, self.batch_size):
            rows.append(some)
            bad += [str(image) for image in unreadable]
        table = pa.Table.from_pandas(pd.concat(rows), preserve_index=False)
        table = table.replace_schema_metadata({b"unreadable": "\n".join(bad).encode()})
        self.run.write_table(part.file, table)


def predict_many(
    adapters: Sequence[str],
    found: Sequence[ImageFiles],
    out: str,
    top: int,
    batch_size: int,
    console: Console,
    address: str | None = None,
) -> list[str]:
    """Predict images into a folder of Parquet files; which could not be read, with the reason.

    Raises UserError for files that are no adapters.
    """
    run, folder = RunDirectory.around(out.rstrip("/"))
    run.require_writable()
    top = min(top, *(len(class_names(file)) for file in adapters))
    wanted = list(parts(found, adapters, top, folder))
    present = set(run.names(folder))
    missing = [part for part in wanted if part.file not in present]
    total = sum(part.images.n_images for part in missing)
    with StageProgress(console, "predict", total, "images") as progress:
        for row in _rows(missing, adapters, top, batch_size, run, address) if missing else ():
            raise_user_error([row["user_error"]])
            progress.advance(int(row["n_images"]))
    bad: list[str] = []
    for part in wanted:
        with run.open_table(part.file) as file:
            said = (file.schema_arrow.metadata or {}).get(b"unreadable", b"").decode()
        bad += said.splitlines()
    return bad


def _rows(
    missing: Sequence[Part],
    adapters: Sequence[str],
    top: int,
    batch_size: int,
    run: RunDirectory,
    address: str | None,
) -> Iterator[dict[str, Any]]:
    cluster = connect(address)
    count, gpus = backbone_actors(cluster, Resources())
    DataContext.get_current().enable_progress_bars = False
    files = [str(Path(file).absolute()) for file in adapters]
    pipeline = ray.data.from_items(
        [{"part": part} for part in missing], override_num_blocks=len(missing)
    ).map_batches(
        PartPredictor,
        batch_size=1,
        fn_constructor_args=(files, top, batch_size, run),
        compute=actor_pool(cluster, Resources(), count, len(missing)),
        num_gpus=gpus or None,
        num_cpus=None if gpus else 1,
    )
    yield from pipeline.iter_rows()
