"""Cross-validation through Ray Tune: points of a search space on folds of a task's features.

A trial is one point of a search space on one fold. Trials of the same features are trained together, and a
trial of Ray Tune (a job) does one or several folds in turn: starting one costs a fraction of a second.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import ray

from h2t.errors import UserError
from h2t.features import keep_features
from h2t.head2toe import Head
from h2t.metrics import accuracy, cross_entropy
from pipelines.artifacts import features, task_columns, write_rows
from pipelines.cluster import concurrent_trials, slots, trial_resources
from pipelines.feature_cache import FeatureCache, cached_features, matrices_kept
from pipelines.feature_files import FeatureMatrix
from pipelines.head_training import fit_heads
from pipelines.jobs import Job, run_jobs
from pipelines.products import Trial, trials_file
from pipelines.run_directory import RunDirectory
from pipelines.schemas import TRIALS
from pipelines.session import Advance, Session
from pipelines.task_data import TaskData

JOBS_PER_SLOT = 4


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
    packs = packed(session, missing)
    files = {
        (pack.trials[0].task, pack.target_size): features(task, task.fold_split, pack.target_size).names(run)
        for pack in packs
        for task in [session.tasks[pack.trials[0].task]]
    }
    largest = max(session.matrix_bytes[pack.target_size] for pack in packs)
    try:
        kept = matrices_kept(largest, cluster.store_bytes)
    except UserError as error:
        if cluster.local:
            raise
        kept = 1
        session.console.print(f"{error}; nodes that are to come may have larger ones")
    cache = FeatureCache.options(num_cpus=0).remote(run, files, kept)  # type: ignore[attr-defined]
    try:
        run_jobs(
            session,
            stage,
            as_jobs(packs, concurrent or slots(cluster, resources)),
            run_packs,
            {"tasks": dict(session.tasks), "run": run, "cache": cache},
            resources=resources,
            concurrent=concurrent,
            on_done=lambda job: advance(job.n_units, job.config["task"]),
        )
    finally:
        ray.kill(cache)


def packed(session: Session, missing: Sequence[Trial]) -> list[Pack]:
    """Trials of equal task, target size, fold and scope, at most ``resources.points_per_trial`` together."""
    together: dict[Any, list[Trial]] = {}
    for trial in missing:
        key = trial.task, trial.point.target_size, trial.fold, trial.folder, trial.scope
        together.setdefault(key, []).append(trial)
    packs = []
    for members in together.values():
        size = session.config.resources.points_per_trial or len(members)
        for start in range(0, len(members), size):
            chunk = tuple(members[start : start + size])
            packs.append(Pack(chunk, trials_file(chunk)))
    return sorted(packs, key=lambda pack: (pack.trials[0].task, pack.target_size))


def as_jobs(packs: Sequence[Pack], n_slots: int) -> list[Job]:
    """Jobs that do packs of the same features in turn.

    Many short packs share a job; but every slot gets several jobs, so that none waits long for the last one.
    """
    size = max(1, len(packs) // (n_slots * JOBS_PER_SLOT))
    jobs = []
    for (task, target_size), group in groupby(packs, lambda pack: (pack.trials[0].task, pack.target_size)):
        members = list(group)
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            folds = sorted({pack.trials[0].fold for pack in chunk})
            config = {"task": task, "target_size": target_size, "folds": folds,
                      "points": [asdict(trial.point) for trial in chunk[0].trials]}  # fmt: skip
            name = f"{task}-T{target_size}-folds-{'-'.join(map(str, folds))}-{start:03d}"
            jobs.append(Job(name, config, chunk, sum(len(pack.trials) for pack in chunk)))
    return jobs


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
    validation_set = ValidationSet(matrix.values[validation], matrix.labels[validation])
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

    def __init__(self, values: np.ndarray, labels: np.ndarray) -> None:
        self.values, self.labels = values, labels
        self.kept: tuple[bool, bytes] | None = None

    def score(self, head: Head) -> dict[str, Any]:
        """Accuracy (a fraction of 1), loss (nats) and number of kept features of a head."""
        if self.kept != (kept := (head.raw, head.kept.tobytes())):
            self.kept = kept
            self.kept_values = keep_features(self.values, head.layout, head.kept, raw=head.raw)
        logits = head.logits(self.kept_values)
        return {
            "validation_accuracy": accuracy(self.labels, logits.argmax(1)),
            "validation_loss": cross_entropy(logits, self.labels),
            "n_kept": len(head.kept),
            "train_loss": head.train_loss,
        }
