"""Products: what one folder of a run directory is to hold, and which work is missing there.

``artifacts.py`` says which products there are. Files of known names are the simple kind. Tables that are long
(features, predictions) are cut by rows into files named after them, so that another size of shards goes on
with what is there. Trials lie in files of any composition, and each row says which trial it is.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd

from h2t.errors import UserError
from h2t.hyperparameters import Hyperparameters
from pipelines.config import fingerprint
from pipelines.run_directory import RunDirectory, Unreachable
from pipelines.scope import EVERYTHING, Scope
from pipelines.task_data import Split


@dataclass(frozen=True)
class Files:
    """Files of known names, each with the unit of work that makes it.

    Beside them may lie files that other work leaves, which end in one of ``keys``.
    """

    folder: str
    units: Mapping[str, Any]
    keys: Sequence[str] = ()

    def is_whole(self, run: RunDirectory, name: str) -> bool:
        """Whether a file can be read as what its ending says."""
        return is_whole(run, name)

    def is_current(self, run: RunDirectory, name: str, location: str) -> bool:
        """Whether it is one of these files, or ends in one of the keys."""
        return name in self.units or name.removesuffix(".parquet").rpartition("-")[2] in self.keys

    def missing(self, run: RunDirectory, present: Sequence[str]) -> list[Any]:
        """Units of the files that are not there, each once."""
        known = set(present)
        return list(dict.fromkeys(unit for name, unit in self.units.items() if name not in known))


@dataclass(frozen=True)
class Gap:
    """Consecutive rows that no file of ``files`` holds."""

    files: "RowFiles"
    start: int
    stop: int


@dataclass(frozen=True)
class RowFiles:
    """A table of the rows of one split, cut into files anyhow; each is named after the rows that it holds.

    ``tag`` tells tables of the same rows apart; ``labels``: int32 [n_rows] that its rows must have;
    ``bad_rows``: where the names of the lists of rows that are left out begin.
    """

    folder: str
    key: str
    task: str
    split: Split
    n_rows: int
    tag: int | str
    stage: str
    labels: np.ndarray | None = field(default=None, compare=False, repr=False)
    bad_rows: str = ""

    def is_whole(self, run: RunDirectory, name: str) -> bool:
        """Whether a file has just the rows that its name says, each with its label, bad rows aside.

        Of a table with several rows for an image, each image has as many. Only these columns are read; the
        others are checked when they are.
        """
        try:
            keys = run.read_table([name], ["index", "label"])
        except FileNotFoundError:
            return False
        except UserError as error:
            return _unless_unreachable(error)
        if self.labels is None or not self.holds_rows(name):
            return True
        index, labels = (keys[column].to_numpy() for column in ("index", "label"))
        found, counts = np.unique(index, return_counts=True)
        expected = np.array(self.rows(name))
        if not np.array_equal(found, expected):
            expected = np.setdiff1d(expected, self._bad_rows(run, name))
        right = np.array_equal(found, expected) and len(set(counts)) <= 1
        return right and bool((labels == self.labels[index]).all())

    def _bad_rows(self, run: RunDirectory, name: str) -> np.ndarray:
        """The rows of a file that were left out as bad, int64."""
        rows = self.rows(name)
        listed = f"{self.bad_rows}-{rows.start:06d}-{rows.stop:06d}-"
        lists = [
            file
            for file in run.names(listed.rpartition("/")[0])
            if file.startswith(listed) and file.endswith(".parquet")
        ]
        return run.read_frame(lists, ["index"])["index"].to_numpy() if lists else np.empty(0, np.int64)

    def name(self, start: int, stop: int) -> str:
        """The file of rows ``start`` up to ``stop``."""
        return f"{self.folder}/rows-{start:06d}-{stop:06d}-{self.key}.parquet"

    def is_current(self, run: RunDirectory, name: str, location: str) -> bool:
        """Whether a file holds rows of this table."""
        return self.holds_rows(name)

    def holds_rows(self, name: str) -> bool:
        """Whether a file of that name holds rows of this table."""
        parts = name.rpartition("/")[2].removesuffix(".parquet").split("-")
        if not name.endswith(".parquet") or len(parts) != 4 or parts[0] != "rows" or parts[3] != self.key:
            return False
        return parts[1].isdecimal() and parts[2].isdecimal() and int(parts[2]) <= self.n_rows

    def rows(self, name: str) -> range:
        """The rows that a current file holds."""
        _, start, stop, _ = name.rpartition("/")[2].split("-")
        return range(int(start), int(stop))

    def _without_overlap(self, names: Iterable[str]) -> list[str]:
        chosen: list[str] = []
        for name in sorted(filter(self.holds_rows, names)):
            if not chosen or self.rows(name).start >= self.rows(chosen[-1]).stop:
                chosen.append(name)
        return chosen

    def missing(self, run: RunDirectory, present: Sequence[str]) -> list[Gap]:
        """The rows that no present file holds."""
        rows = [self.rows(name) for name in self._without_overlap(present)]
        stops, starts = [0, *(r.stop for r in rows)], [*(r.start for r in rows), self.n_rows]
        return [Gap(self, a, b) for a, b in zip(stops, starts, strict=True) if a < b]

    def names(self, run: RunDirectory) -> list[str]:
        """Files that hold every row once. Raises UserError that names the stage to run where rows lack."""
        present = run.names(self.folder)
        if self.missing(run, present):
            raise UserError(f"{self.folder} lacks rows in {run.uri}: run the {self.stage} stage first")
        return self._without_overlap(present)


@dataclass(frozen=True)
class Shard:
    """Rows of a split that are read, computed and written together; ``files``: (tag, name) of each table."""

    task: str
    split: Split
    start: int
    stop: int
    files: tuple[tuple[Any, str], ...]

    @property
    def indices(self) -> range:
        """The rows of the split that the shard holds."""
        return range(self.start, self.stop)


def shards(gaps: Sequence[Gap], size: int) -> list[Shard]:
    """Cut gaps into shards of at most ``size`` rows; tables that lack the same rows share a shard."""
    by_split: dict[tuple[str, Split], list[Gap]] = {}
    for gap in gaps:
        by_split.setdefault((gap.files.task, gap.files.split), []).append(gap)
    result = []
    for (task, split), members in by_split.items():
        bounds = sorted({row for gap in members for row in (gap.start, gap.stop)})
        for first, last in pairwise(bounds):
            tables = [gap.files for gap in members if gap.start <= first and last <= gap.stop]
            for start in range(first, last if tables else first, size):
                stop = min(start + size, last)
                files = tuple((table.tag, table.name(start, stop)) for table in tables)
                result.append(Shard(task, split, start, stop, files))
    return result


def count_rows(gaps: Sequence[Gap]) -> int:
    """The number of different rows in gaps, whatever the number of tables that lack them."""
    return sum(len(shard.indices) for shard in shards(gaps, max((gap.stop for gap in gaps), default=1)))


@dataclass(frozen=True)
class Trial:
    """One point of a search space on one fold; ``key`` says what it depends on.

    Its row lies in a file in ``folder`` whose name has the ``context``.
    """

    task: str
    fold: int
    point: Hyperparameters
    key: str
    folder: str
    context: str
    scope: Scope = EVERYTHING


def trials_file(trials: Sequence[Trial]) -> str:
    """The file of some trials of one folder, target size and fold."""
    keys, first = fingerprint([trial.key for trial in trials]), trials[0]
    stem = f"target-size-{first.point.target_size}-fold-{first.fold}"
    return f"{first.folder}/{stem}-{first.context}-{keys}.parquet"


@dataclass(frozen=True)
class TrialFiles:
    """Trials in files of any composition; ``context``: the part of their keys that names files.

    ``shared``: a folder of another stage that may hold some of the trials; "" for none.
    """

    folder: str
    context: str
    trials: tuple[Trial, ...]
    shared: str = ""

    def is_whole(self, run: RunDirectory, name: str) -> bool:
        """Whether a file can be read as what its ending says."""
        return is_whole(run, name)

    def is_current(self, run: RunDirectory, name: str, location: str) -> bool:
        """Whether a file holds some of these trials; it may hold others, of a larger grid, beside them."""
        of_context = self._is_named_by(name)
        if not of_context or not is_whole(run, location):
            return of_context
        keys = set(run.read_frame([location], ["trial"])["trial"])
        return any(trial.key in keys for trial in self.trials)

    def missing(self, run: RunDirectory, present: Sequence[str]) -> list[Trial]:
        """Trials of which no present file has the row."""
        files = self._with_shared(run, present)
        done = set(run.read_frame(files, ["trial"])["trial"]) if files else set()
        return [trial for trial in self.trials if trial.key not in done]

    def _with_shared(self, run: RunDirectory, present: Sequence[str]) -> list[str]:
        shared = run.keyed_names(self.shared, ".parquet") if self.shared else []
        return [name for name in (*present, *shared) if self._is_named_by(name)]

    def _is_named_by(self, name: str) -> bool:
        return name.endswith(".parquet") and name.split("-")[-2:-1] == [self.context]

    def read(self, run: RunDirectory) -> pd.DataFrame:
        """The rows of all trials in their order. Raises UserError where one is missing."""
        present = run.keyed_names(self.folder, ".parquet")
        if self.missing(run, present):
            raise UserError(f"{self.folder} lacks trials in {run.uri}: run the sweep stage first")
        files = self._with_shared(run, present)
        rows = run.read_frame(files).drop_duplicates("trial").set_index("trial")
        return rows.loc[[trial.key for trial in self.trials]].reset_index()


def is_whole(run: RunDirectory, name: str) -> bool:
    """Whether a file can be read as what its ending says.

    Tables are small here and read with their checksums; of heads the length is compared, and their checksum
    when they are used.
    """
    try:
        if name.endswith(".parquet"):
            run.read_table([name])
            return True
        if name.endswith(".safetensors"):
            header = run.read_header(name)
            entries = json.loads(header[8:])
            ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
            return run.size(name) == len(header) + max(ends, default=0)
        json.loads(run.read(name))
    except (FileNotFoundError, KeyError):
        return False
    except ValueError as error:  # a UserError, or one of JSON
        return _unless_unreachable(error)
    return True


def _unless_unreachable(error: ValueError) -> Literal[False]:
    """That a file is not whole; a store that does not answer says nothing of its files, and is raised."""
    if isinstance(error, Unreachable):
        raise error
    return False
