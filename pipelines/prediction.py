"""Test images through many heads at once, by Ray Data: for every stage that tests heads on frozen features.

Test features are never stored: image → backbone → features → logits of every head → predictions.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from h2t.head2toe import HeadBank
from pipelines.artifacts import HeadToTrain
from pipelines.config import Config
from pipelines.model_files import read_head
from pipelines.products import Gap, Shard
from pipelines.run_directory import RunDirectory
from pipelines.session import Advance, Session
from pipelines.shard_stream import FeatureReader, Seen, process_shards, shards_for
from pipelines.task_data import TaskData

Tables = Mapping[str, Mapping[str, Sequence[HeadToTrain]]]
"""Task -> tag of a table of predictions -> the heads that it is of."""
MakeTable = Callable[[TaskData, str, Sequence[HeadToTrain], np.ndarray, np.ndarray], pa.Table]
"""From task, tag, heads, indices int32 [n] and logits float32 [n_heads, n, n_classes] to rows."""


def stream_predictions(
    session: Session, gaps: Sequence[Gap], tables: Tables, make_table: MakeTable, advance: Advance
) -> None:
    """Stream the test images whose predictions are missing through the heads of all tables that lack them."""
    jobs = [job for of_task in tables.values() for jobs in of_task.values() for job in jobs]
    sizes = sorted({job.point.target_size for job in jobs})
    missing = shards_for(session, gaps)
    step = partial(Predictor, session.run, tables, make_table, sizes, session.config)
    process_shards(session, missing, step, advance)


class Predictor:
    """Step of an evaluation: a shard's test images to the predictions of heads; state of an actor."""

    def __init__(
        self, run: RunDirectory, tables: Tables, make_table: MakeTable, sizes: list[int], config: Config
    ) -> None:
        self.run, self.tables, self.make_table = run, tables, make_table
        self.reader = FeatureReader(config, sizes)
        self.banks: dict[str, HeadBank] = {}
        self.task = ""

    def __call__(
        self, task: TaskData, shard: Shard, images: list[np.ndarray], index: np.ndarray, seen: Seen
    ) -> None:
        """Write the shard's predictions."""
        if self.task != task.name:
            self.task, self.banks = task.name, {}
        for tag, _ in shard.files:
            if tag not in self.banks:
                heads = [read_head(self.run, job.file)[0] for job in self.tables[task.name][tag]]
                self.banks[tag] = HeadBank(heads, self.reader.device)
        banks = {tag: self.banks[tag] for tag, _ in shard.files}
        parts = {
            tag: [np.empty((bank.n_heads, 0, task.n_classes), np.float32)] for tag, bank in banks.items()
        }
        for taps in self.reader.read_all(images, seen):
            sizes = {size for bank in banks.values() for size in bank.target_sizes}
            features = {size: torch.cat(taps[size], 1) for size in sizes}
            for tag, bank in banks.items():
                parts[tag].append(bank.logits(features))
        for tag, name in shard.files:
            table = self.make_table(
                task, tag, self.tables[task.name][tag], index, np.concatenate(parts[tag], 1)
            )
            self.run.write_table(name, table, compression="zstd")
