"""Cross-validation through Ray Tune: points of a search space on folds of a task's features.

A trial is one point of a search space on one fold. Trials of the same features are trained together, and a
trial of Ray Tune (a job) does one or several folds in turn: starting one costs a fraction of a second.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from h2t.costs import shared_training
from h2t.features import keep_features
from h2t.head2toe import Head
from h2t.metrics import accuracy, cross_entropy
from pipelines.artifacts import features, task_columns, write_rows
from pipelines.cluster import concurrent_trials, reserved_memory, slots, trial_resources
from pipelines.feature_cache import cached_features, feature_cache
from pipelines.feature_files import FeatureMatrix
from pipelines.head_training import fit_heads, training_flops, training_memory
from pipelines.jobs import Job, NoMoreJobs, run_jobs
from pipelines.packing import pieces
from pipelines.products import RowFiles, Trial, trials_file
from pipelines.run_directory import RunDirectory
from pipelines.schemas import TRIALS
from pipelines.session import Advance, Background, Session
from pipelines.task_data import TaskData

PACKS_PER_SLOT, JOBS_PER_SLOT = 2, 4
LOOKED_EVERY_S = 2.0
LEAST_FLOPS = 1e11  # of a job or a part of a fold: two seconds of a core, beside which its start counts


@dataclass(frozen=True)
class Pack:
    """Trials of one task, target size, fold and scope, trained together to one file."""

    trials: tuple[Trial, ...]
    file: str

    @property
    def target_size(self) -> int:
        """That of the features, which all trials share."""
        return self.trials[0].point.target_size


def make_trials(stage: str, session: Session, missing: Sequence[Trial], advance: Advance) -> None:
    """Train the missing trials as jobs of Ray Tune, which are a stage's."""
    config, cluster, run = session.config, session.cluster, session.run
    resources = trial_resources(cluster, config.resources)
    concurrent = concurrent_trials(cluster, config.resources)
    n_slots = concurrent or slots(cluster, resources)
    jobs = as_jobs(session, packed(session, missing, n_slots), n_slots)
    tables = {
        (task.name, size): features(task, task.fold_split, size)
        for job in jobs
        for task, size in [(session.tasks[job.config["task"]], job.config["target_size"])]
    }
    if not session.extraction:
        for table in tables.values():
            table.names(run)  # raises where some are not there
    with feature_cache(session, tables) as cache:
        run_jobs(
            session,
            stage,
            jobs,
            run_packs,
            {"tasks": dict(session.tasks), "run": run, "cache": cache},
            resources=resources,
            concurrent=concurrent,
            on_done=lambda job: advance(job.n_units, job.config["task"]),
            ready=Arrivals(run, tables, session.extraction).ready if session.extraction else None,
        )


class Arrivals:
    """Which features are whole, of those that are being computed meanwhile."""

    def __init__(
        self, run: RunDirectory, tables: Mapping[tuple[str, int], RowFiles], extraction: Background
    ) -> None:
        self.run, self.missing, self.extraction = run, dict(tables), extraction
        self.looked = -math.inf

    def ready(self, job: Job) -> bool:
        """Whether the features of a job are whole. Raises NoMoreJobs once their computation has failed."""
        if self.extraction.error:
            raise NoMoreJobs
        now = time.monotonic()
        if self.missing and now - self.looked > LOOKED_EVERY_S:
            self.looked = now
            self.missing = {
                key: table
                for key, table in self.missing.items()
                if table.missing(self.run, self.run.names(table.folder))
            }
        return (job.config["task"], job.config["target_size"]) not in self.missing


def packed(session: Session, missing: Sequence[Trial], n_slots: int) -> list[Pack]:
    """Trials of equal task, target size, fold and scope, at most ``resources.points_per_trial`` together.

    Where devices are many, those of a fold are cut further, but for trials that share a training.
    """
    together: dict[Any, dict[str, list[Trial]]] = {}
    for trial in missing:
        key = trial.task, trial.point.target_size, trial.fold, trial.folder, trial.scope
        together.setdefault(key, {}).setdefault(shared_training(trial.point), []).append(trial)
    cut = [list(shared.values()) for shared in together.values()]
    if n_slots > 1:
        cut = pieces(cut, lambda trials: flops(session, trials), n_slots, PACKS_PER_SLOT, LEAST_FLOPS)
    most = session.config.resources.points_per_trial
    packs = []
    for piece in cut:
        members = [trial for trials in piece for trial in trials]
        for start in range(0, len(members), most or len(members)):
            chunk = tuple(members[start : start + (most or len(members))])
            packs.append(Pack(chunk, trials_file(chunk)))
    return packs


def flops(session: Session, trials: Sequence[Trial]) -> int:
    """Operations of trials of one task, target size and fold."""
    first = trials[0]
    n_images = len(session.tasks[first.task].fold(first.fold, first.scope.shots)[0])
    return training_flops(session, first.task, [trial.point for trial in trials], n_images)


def as_jobs(session: Session, packs: Sequence[Pack], n_slots: int) -> list[Job]:
    """Jobs that do packs of the same features in turn; those of the dearest features come first.

    Many short packs share a job; but every slot gets several jobs, so that none waits long for the last one.
    """
    by_features: dict[tuple[str, int], list[Pack]] = {}
    for pack in packs:
        by_features.setdefault((pack.trials[0].task, pack.target_size), []).append(pack)
    chunks = pieces(
        by_features.values(),
        lambda pack: flops(session, pack.trials),
        n_slots,
        JOBS_PER_SLOT,
        LEAST_FLOPS,
    )
    jobs = []
    for number, chunk in enumerate(chunks):
        task, target_size = chunk[0].trials[0].task, chunk[0].target_size
        folds = sorted({pack.trials[0].fold for pack in chunk})
        config = {"task": task, "target_size": target_size, "folds": folds,
                  "points": [asdict(trial.point) for trial in chunk[0].trials]}  # fmt: skip
        name = f"{task}-T{target_size}-folds-{'-'.join(map(str, folds))}-{number:03d}"
        n_trials = sum(len(pack.trials) for pack in chunk)
        jobs.append(Job(name, config, chunk, n_trials, _memory(session, chunk)))
    return jobs


def _memory(session: Session, packs: Sequence[Pack]) -> int:
    """Bytes that are set apart for a job that does packs in turn."""
    wanted = max(
        training_memory(
            session, pack.trials[0].task, [trial.point for trial in pack.trials], pack.trials[0].scope
        )
        for pack in packs
    )
    what = f"{packs[0].trials[0].task}: a trial at target size {packs[0].target_size}"
    return reserved_memory(session.cluster, wanted, what)


def run_packs(packs: Sequence[Pack], shared: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Train packs in turn, each to its file; yield what Tune shows of each."""
    run: RunDirectory = shared["run"]
    for pack in packs:
        if run.exists(pack.file):
            continue  # done before the worker of an earlier attempt died
        task: TaskData = shared["tasks"][pack.trials[0].task]
        rows = run_trials(task, pack.trials, cached_features(shared["cache"], task.name, pack.target_size))
        write_rows(run, pack.file, TRIALS, rows)
        best = max(rows, key=lambda row: row["validation_accuracy"])
        yield {
            "fold": best["fold"],
            "n_points": len(rows),
            "best_validation_accuracy": best["validation_accuracy"],
            "best_method": best["method"],
        }


def run_trials(task: TaskData, members: Sequence[Trial], matrix: FeatureMatrix) -> list[dict[str, Any]]:
    """Train points on their fold; one row of ``schemas.TRIALS`` each, in their order."""
    fold, scope = members[0].fold, members[0].scope
    validation = matrix.rows_of(task.fold(fold, scope.shots)[1])
    started = time.perf_counter()
    validation_set = ValidationSet(matrix, validation)
    seed = task.config.seed
    scores = {
        head.hyperparameters: validation_set.score(head)
        for head in fit_heads(task, matrix, [trial.point for trial in members], [seed], fold, scope)
    }
    seconds = (time.perf_counter() - started) / len(members)
    return [
        {
            **task_columns(task),
            **asdict(trial.point),
            **scores[trial.point],
            "fold": trial.fold,
            "seed": seed,
            "status": "done",
            "n_validation": len(validation),
            "n_features": matrix.layout.n_features,
            "seconds": seconds,
            "fold_scheme": task.config.cross_validation.scheme,
            "trial": trial.key,
        }
        for trial in members
    ]


class ValidationSet:
    """Validation rows. The kept columns are cached: consecutive heads often keep the same features."""

    def __init__(self, matrix: FeatureMatrix, rows: np.ndarray) -> None:
        self.values, self.labels, self.rows = matrix.values, matrix.labels[rows], rows
        self.kept: tuple[bool, bytes] | None = None

    def score(self, head: Head) -> dict[str, Any]:
        """Accuracy (a fraction of 1), loss (nats) and number of kept features of a head."""
        if self.kept != (kept := (head.raw, head.kept.tobytes())):
            self.kept = kept
            self.kept_values = keep_features(self.values, head.layout, head.kept, self.rows, raw=head.raw)
        logits = head.logits(self.kept_values)
        return {
            "validation_accuracy": accuracy(self.labels, logits.argmax(1)),
            "validation_loss": cross_entropy(logits, self.labels),
            "n_kept": len(head.kept),
            "train_loss": head.train_loss,
        }
