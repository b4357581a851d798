"""Predictions of saved adapters for images without labels: ``h2t predict``.

Images are read, decoded and predicted in batches, so that memory holds two of these however many there are.
Adapters of one frozen backbone share its forward passes, which compute what they read and no more.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from rich.console import Console
from scipy.special import softmax
from torch import nn

from h2t.adapter import Adapter
from h2t.device import default_device
from h2t.errors import UserError
from h2t.finetuning import TrainableModel, out_of_memory
from h2t.head2toe import Head
from h2t.images.preprocessing import prepare, to_batch
from h2t.images.source import BadImage, EncodedImage
from h2t.images.unlabelled import ImageFiles
from h2t.shared_pass import SharedPass
from pipelines.progress import StageProgress
from pipelines.run_directory import RunDirectory

FORMATS = (".parquet", ".csv")


@dataclass(frozen=True)
class Named:
    """An adapter by the name of its file."""

    name: str
    adapter: Adapter


class Predictor:
    """Adapters, those of one frozen backbone grouped for shared forward passes."""

    def __init__(self, adapters: Sequence[Named]) -> None:
        self.adapters = adapters
        groups: dict[str, list[int]] = {}
        for position, named in enumerate(adapters):
            groups.setdefault(_group_key(named.adapter, position), []).append(position)
        self.groups: list[tuple[list[int], nn.Module]] = []
        for positions in groups.values():
            first = adapters[positions[0]].adapter
            heads = [head for p in positions if isinstance(head := adapters[p].adapter.head, Head)]
            shared = SharedPass(first.backbone, heads, first.aggregation) if heads else first.model
            self.groups.append((positions, shared))

    def prepared(
        self, images: Sequence[EncodedImage]
    ) -> tuple[list[list[np.ndarray]], list[str], list[BadImage]]:
        """Per group the images as its backbone takes them; their names; and those that cannot be decoded."""
        by_group: list[list[np.ndarray]] = [[] for _ in self.groups]
        names: list[str] = []
        bad: list[BadImage] = []
        for image in images:
            try:
                ready = [prepare(image, self.adapters[positions[0]].adapter.preprocessing)
                         for positions, _ in self.groups]  # fmt: skip
            except BadImage as error:
                bad.append(error)
                continue
            names.append(image.path)
            for group, pixels in zip(by_group, ready, strict=True):
                group.append(pixels)
        return by_group, names, bad

    def probabilities(self, by_group: list[list[np.ndarray]]) -> list[np.ndarray]:
        """Of each adapter, float32 [b, n_classes]."""
        found: dict[int, np.ndarray] = {}
        for (positions, model), images in zip(self.groups, by_group, strict=True):
            adapter = self.adapters[positions[0]].adapter
            message = f"{len(images)} images at once do not fit in memory; lower --batch-size"
            with torch.no_grad(), out_of_memory(message):
                logits = model(to_batch(images, adapter.preprocessing, adapter.device))
            of_each = logits if isinstance(logits, list) else [logits]
            found |= {p: values.cpu().numpy() for p, values in zip(positions, of_each, strict=True)}
        return [softmax(found[position], axis=1) for position in range(len(self.adapters))]


def _group_key(adapter: Adapter, position: int) -> str:
    """Equal for adapters that can share forward passes; a fine-tuned network is alone."""
    if isinstance(adapter.head, TrainableModel):
        return f"alone {position}"
    backbone = adapter.backbone
    return json.dumps(
        [backbone.name, backbone.weights, backbone.precision, [tap.name for tap in backbone.taps],
         repr(adapter.aggregation), repr(adapter.preprocessing)]
    )  # fmt: skip


def load_adapters(files: Sequence[str]) -> list[Named]:
    """Adapters by file, all on the GPU where there is one. Raises UserError for the first that is none."""
    names = [Path(file).name.removesuffix(".safetensors") for file in files]
    unique = names if len(set(names)) == len(names) else [file.removesuffix(".safetensors") for file in files]
    device = default_device()
    return [Named(name, Adapter.load(file, device)) for name, file in zip(unique, files, strict=True)]


def predictions(
    predictor: Predictor, images: Iterable[EncodedImage], top: int, batch_size: int
) -> Iterator[tuple[pd.DataFrame, list[BadImage], int]]:
    """Rows, images that cannot be decoded, and the number of images, of one batch after the other.

    The next batch is read and decoded while one is computed.
    """
    stream = iter(images)

    def next_batch() -> tuple[list[list[np.ndarray]], list[str], list[BadImage]]:
        return predictor.prepared(list(islice(stream, batch_size)))

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next_batch)
        while True:
            by_group, names, bad = coming.result()
            if not names and not bad:
                return
            coming = thread.submit(next_batch)
            found = predictor.probabilities(by_group) if names else []
            rows = [
                _rows(named, names, values, top)
                for named, values in zip(predictor.adapters, found, strict=False)
            ]
            yield pd.concat(rows) if rows else pd.DataFrame(), bad, len(names) + len(bad)


def _rows(named: Named, names: list[str], probabilities: np.ndarray, top: int) -> pd.DataFrame:
    """One row per image: the most probable class, and the first ``top`` with their probabilities."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    best = np.take_along_axis(probabilities, order, 1)
    labels = named.adapter.classes.astype(str)[order]
    columns = {"image": names, "adapter": named.name, "label": labels[:, 0], "probability": best[:, 0]}
    for place in range(1, order.shape[1]):
        columns |= {f"label_{place + 1}": labels[:, place], f"probability_{place + 1}": best[:, place]}
    return pd.DataFrame(columns)


def check_options(out: str | None, top: int) -> None:
    """Raise UserError for an ``out`` of another format and a ``top`` below 1."""
    if out is not None and not out.endswith((*FORMATS, "/")):
        raise UserError(
            f"--out {out}: expected a name that ends with {' or '.join(FORMATS)}, or with / for a folder"
        )
    if top < 1:
        raise UserError(f"--top {top}: expected 1 or more")


def predict(
    files: Sequence[str],
    found: Sequence[ImageFiles],
    out: str | None,
    top: int,
    batch_size: int,
    console: Console,
) -> tuple[pd.DataFrame, list[str]]:
    """Predict images and write rows to ``out``; the first rows, and which cannot be decoded, with the reason.

    Raises UserError for files that are no adapters.
    """
    shown, bad = pd.DataFrame(), list[str]()
    with ExitStack() as opened:
        predictor = Predictor(load_adapters(files))
        top = min(top, *(len(named.adapter.classes) for named in predictor.adapters))
        writer: pq.ParquetWriter | pyarrow.csv.CSVWriter | None = None
        total = sum(files.n_images for files in found)
        with StageProgress(console, "predict", total, "images") as progress:
            for rows, unreadable, count in predictions(predictor, chain(*found), top, batch_size):
                bad += map(str, unreadable)
                progress.advance(count)
                if rows.empty:
                    continue
                shown = pd.concat([shown, rows]) if len(shown) < 20 else shown
                table = pa.Table.from_pandas(rows, preserve_index=False)
                if out and writer is None:
                    destination, name = RunDirectory.around(out)
                    sink = opened.enter_context(destination.writing(name))
                    kind = pq.ParquetWriter if out.endswith(".parquet") else pyarrow.csv.CSVWriter
                    writer = opened.enter_context(kind(sink, table.schema))
                if writer is not None:
                    writer.write_table(table)
    return shown.head(20), bad
