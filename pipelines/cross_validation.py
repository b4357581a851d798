"""Cross-validation through Ray Tune: points of a search space on folds of a task's features.

A trial is one point of a search space on one fold. Trials of the same features are trained together, and a
trial of Ray Tune (a job) does one or several folds in turn: starting one costs a fraction of a second.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from h2t.costs import shared_training
from h2t.features import TapFeatures, keep_features
from h2t.head2toe import Head, logits
from pipelines.artifacts import features, grams, task_columns, write_rows
from pipelines.cluster import concurrent_trials, reserved_memory, slots, trial_resources
from pipelines.feature_cache import cached_features, feature_cache
from pipelines.feature_files import FeatureMatrix, open_features
from pipelines.gram_files import StoredGrams, open_grams
from pipelines.head_training import fit_heads, solving_memory, training_flops, training_memory
from pipelines.jobs import Job, NoMoreJobs, run_jobs
from pipelines.packing import pieces
from pipelines.products import Files, RowFiles, Trial, trials_file
from pipelines.results import validation_columns
from pipelines.run_directory import RunDirectory
from pipelines.schemas import TRIALS
from pipelines.scope import reads_by_tap
from pipelines.session import Advance, Background, Product, Session
from pipelines.streamed_heads import score_by_products
from pipelines.task_data import TaskData

PACKS_PER_SLOT, JOBS_PER_SLOT = 2, 4
LOOKED_EVERY_S = 2.0
LEAST_FLOPS = 1e11  # of a job or a part of a fold: two seconds of a core, beside which its start counts


class Inputs(NamedTuple):
    """Features that trials read: all of them at once, or tap by tap, beginning with their products."""

    task: str
    target_size: int
    by_tap: bool


@dataclass(frozen=True)
class Pack:
    """Trials of one task, target size, fold and scope, trained together to one file."""

    trials: tuple[Trial, ...]
    file: str

    @property
    def inputs(self) -> "Inputs":
        """What its trials read."""
        first = self.trials[0]
        return Inputs(first.task, self.target_size, reads_by_tap(first.point.method, first.scope))

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
    wanted = {
        inputs: read_by(session, inputs) for inputs in dict.fromkeys(job.work[0].inputs for job in jobs)
    }
    tables = {
        (inputs.task, inputs.target_size): product
        for inputs, products in wanted.items()
        for product in products
        if isinstance(product, RowFiles) and not inputs.by_tap
    }
    if not session.extraction:
        for table in tables.values():
            table.names(run)  # raises where some are not there
    shared = {"tasks": dict(session.tasks), "run": run, "layouts": dict(session.layouts), "wanted": wanted}
    with feature_cache(session, tables) if tables else nullcontext() as cache:
        run_jobs(
            session,
            stage,
            jobs,
            run_packs,
            shared | {"cache": cache},
            resources=resources,
            concurrent=concurrent,
            on_done=lambda job: advance(job.n_units, job.config["task"]),
            ready=Arrivals(run, wanted, session.extraction).ready if session.extraction else None,
        )


def read_by(session: Session, inputs: Inputs) -> list[RowFiles | Files]:
    """The products that trials read: features, and those of taps with each other, or either."""
    task = session.tasks[inputs.task]
    read: list[RowFiles | Files] = []
    if session.config.features.store == "features":
        read.append(features(task, task.fold_split, inputs.target_size))
    if inputs.by_tap:
        size = inputs.target_size
        read.append(grams(task, task.fold_split, size, session.layouts[size]))
    return read


class Arrivals:
    """Which features are whole, of those that are being computed meanwhile."""

    def __init__(
        self,
        run: RunDirectory,
        wanted: Mapping[Inputs, Sequence[Product]],
        extraction: Background,
    ) -> None:
        self.run, self.missing, self.extraction = run, dict(wanted), extraction
        self.looked = -math.inf

    def ready(self, job: Job) -> bool:
        """Whether the features of a job are whole. Raises NoMoreJobs once their computation has failed."""
        if self.extraction.error:
            raise NoMoreJobs
        now = time.monotonic()
        if self.missing and now - self.looked > LOOKED_EVERY_S:
            self.looked = now
            self.missing = {
                key: products
                for key, products in self.missing.items()
                if any(product.missing(self.run, self.run.names(product.folder)) for product in products)
            }
        return job.work[0].inputs not in self.missing


def packed(session: Session, missing: Sequence[Trial], n_slots: int) -> list[Pack]:
    """Trials of equal task, target size, fold and scope, at most ``resources.points_per_trial`` together.

    Where devices are many, those of a fold are cut further, but for trials that share a training.
    """
    together: dict[Any, dict[str, list[Trial]]] = {}
    for trial in missing:
        key = (trial.task, trial.point.target_size, trial.fold, trial.folder, trial.scope,
               reads_by_tap(trial.point.method, trial.scope))  # fmt: skip
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
    by_features: dict[Inputs, list[Pack]] = {}
    for pack in packs:
        by_features.setdefault(pack.inputs, []).append(pack)
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
        solving_memory(session, pack.trials[0].task, pack.target_size)
        if pack.inputs.by_tap
        else training_memory(
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
        rows = run_trials(task, pack.trials, *_opened(task, pack.inputs, shared))
        write_rows(run, pack.file, TRIALS, rows)
        best = max(rows, key=lambda row: row["validation_accuracy"])
        yield {
            "fold": best["fold"],
            "n_points": len(rows),
            "best_validation_accuracy": best["validation_accuracy"],
            "best_method": best["method"],
        }


def _opened(
    task: TaskData, inputs: Inputs, shared: dict[str, Any]
) -> tuple[FeatureMatrix | None, StoredGrams | None]:
    """The features, unless none are stored, and the products of trials that begin with these."""
    if not inputs.by_tap:
        return cached_features(shared["cache"], task.name, inputs.target_size), None
    run: RunDirectory = shared["run"]
    *tables, product = shared["wanted"][inputs]
    grams = open_grams(run, product, shared["layouts"][inputs.target_size])
    return (open_features(run, tables[0].names(run)) if tables else None), grams


def run_trials(
    task: TaskData,
    members: Sequence[Trial],
    matrix: FeatureMatrix | None,
    grams: StoredGrams | None = None,
) -> list[dict[str, Any]]:
    """Train points on their fold; one row of ``schemas.TRIALS`` each, in their order."""
    fold, scope = members[0].fold, members[0].scope
    rows, held = task.fold(fold, scope.shots)
    started = time.perf_counter()
    seed = task.config.seed
    if matrix:
        validation, n_features = matrix.rows_of(held), matrix.layout.n_features
        validation_set = ValidationSet(matrix, validation)
        points = [trial.point for trial in members]
        scores = {
            head.hyperparameters: validation_set.score(head)
            for head in fit_heads(
                task, matrix, points, [seed], fold, scope, products=grams.read if grams else None
            )
        }
    else:
        assert grams
        validation, n_features = grams.rows_of(held), grams.layout.n_features
        score = score_by_products(task, grams, rows, validation)
        scores = {trial.point: score for trial in members}
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
            "n_features": n_features,
            "seconds": seconds,
            "fold_scheme": task.config.cross_validation.scheme,
            "trial": trial.key,
        }
        for trial in members
    ]


class ValidationSet:
    """Validation rows. The kept columns are cached: consecutive heads often keep the same features.

    Of features that stay in their files, those of a tap at a time are read.
    """

    def __init__(self, matrix: FeatureMatrix, rows: np.ndarray) -> None:
        self.values, self.labels, self.rows = matrix.values, matrix.labels[rows], rows
        self.kept: tuple[bool, bytes] | None = None

    def score(self, head: Head) -> dict[str, Any]:
        """Accuracy (a fraction of 1), loss (nats) and number of kept features of a head."""
        return validation_columns(self._logits(head), self.labels, len(head.kept), head.train_loss)

    def _logits(self, head: Head) -> np.ndarray:
        if isinstance(self.values, TapFeatures):
            return logits(head, self.values, self.rows)
        if self.kept != (kept := (head.raw, head.kept.tobytes())):
            self.kept = kept
            self.kept_values = keep_features(self.values, head.layout, head.kept, self.rows, raw=head.raw)
        return head.logits(self.kept_values)
