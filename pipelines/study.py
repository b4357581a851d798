"""The last stage: the studies that need training, on the features that are there.

Their variants (``pipelines/studies``) are cross-validated, trained and tested by the code of the other
stages, all studies together: one run of Ray Tune, one pass over the test images. Trials and heads that other
stages have are used and not made again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from h2t.statistics import accuracy_estimate, paired_difference
from pipelines.artifacts import (
    HeadToTrain,
    backbone_folder,
    chosen_from_trials,
    features,
    features_key,
    head_file,
    heads,
    required,
    study_chosen,
    study_head,
    study_heads,
    study_predictions,
    study_results,
    study_trials,
    task_columns,
    trials_of_variant,
    write_frame,
    write_rows,
)
from pipelines.choice import choose, read_chosen
from pipelines.config import Config
from pipelines.cross_validation import make_trials
from pipelines.feature_files import read_layout
from pipelines.head_training import train_heads
from pipelines.prediction import stream_predictions
from pipelines.products import Files, Gap, RowFiles, TrialFiles, count_rows
from pipelines.run_directory import RunDirectory
from pipelines.schemas import POINT, STUDY_CHOSEN, STUDY_PREDICTIONS, STUDY_RESULTS
from pipelines.session import Advance, Session, Step
from pipelines.studies import find_study
from pipelines.task_data import TaskData
from pipelines.variants import Facts, RecipeStudy, Study, Variant

Key = tuple[str, int]
"""Variant and seed."""


@dataclass(frozen=True)
class TaskStudy:
    """One study on one task, with the facts that its variants follow from."""

    name: str
    facts: Facts
    variants: tuple[Variant, ...]

    @property
    def task(self) -> TaskData:
        """The task."""
        return self.facts.task

    @property
    def key(self) -> tuple[str, str]:
        """What its units of work are called."""
        return self.name, self.task.name

    @property
    def trials(self) -> TrialFiles:
        """The cross-validation of its variants."""
        return study_trials(self.task, self.name, self.variants)

    @property
    def chosen(self) -> Files:
        """What that chose."""
        return study_chosen(self.task, self.name, self.variants)


def task_studies(session: Session) -> list[TaskStudy]:
    """The recipe's studies of the run's own features, on every task that they have variants for."""
    studies = {name: study for name in session.config.studies if isinstance(study := find_study(name), Study)}
    needs = sorted({method for study in studies.values() for method in study.needs})
    chosen = {name: _chosen(session.run, task, needs) for name, task in session.tasks.items() if studies}
    return [
        TaskStudy(name, facts, tuple(variants))
        for task in (session.tasks.values() if studies else ())
        for facts in [_facts(session.run, task, chosen)]
        for name, study in studies.items()
        if (variants := study.variants(facts))
    ]


def _chosen(run: RunDirectory, task: TaskData, methods: Sequence[str]) -> dict[str, Hyperparameters]:
    """What the sweep chose for some methods."""
    if not methods:
        return {}
    (name,) = chosen_from_trials(task).units
    return {point.method: point for point in read_chosen(run, required(run, name, "sweep"), methods)}


def _facts(run: RunDirectory, task: TaskData, chosen: Mapping[str, Mapping[str, Hyperparameters]]) -> Facts:
    read = {
        size: read_layout(run, features(task, "train", size).names(run)[0])
        for size in task.config.grid.target_size
    }
    (embedding,) = {embedding for _, embedding in read.values()}
    return Facts(task, {size: layout for size, (layout, _) in read.items()}, embedding, chosen)


def recipes(config: Config) -> dict[str, dict[str, Config]]:
    """Name of every study of other features -> the folder and the recipe of its variants."""
    studies = {name: study for name in config.studies if isinstance(study := find_study(name), RecipeStudy)}
    return {
        name: {
            f"studies/recipes/{name}/{variant}": config.model_copy(
                update={
                    "backbone": config.backbone.model_copy(update=dict(changes)),
                    "methods": list(study.methods),
                    "studies": [],
                }
            )
            for variant, changes in study.backbones(config).items()
        }
        for name, study in studies.items()
    }


def announce(session: Session, missing: Sequence[Any], advance: Advance) -> None:
    """Say what every study costs, and what of it is still to be done, before it begins."""
    by_name: dict[str, list[TaskStudy]] = {}
    for item in task_studies(session):
        by_name.setdefault(item.name, []).append(item)
    for name, items in by_name.items():
        trials = [trial for item in items for trial in item.trials.trials]
        lacking = sum(
            len(item.trials.missing(session.run, session.run.names(item.trials.folder))) for item in items
        )
        variants = sum(len(item.variants) for item in items)
        n_heads = variants * len(session.config.seeds)
        images = sum(len(item.task.labels["test"]) for item in items)
        session.console.print(
            f"{'study':<9} {name}: {variants} variants on {len(items)} tasks, {len(trials):,} trials "
            f"({len(trials) - lacking:,} of them there), {n_heads:,} heads, {images:,} test images"
        )


def trial_products(session: Session) -> list[TrialFiles]:
    """The cross-validation of every study and task that leaves something to choose."""
    return [product for item in task_studies(session) if (product := item.trials).trials]


def choice_products(session: Session) -> list[Files]:
    """The chosen hyperparameters of every study and task."""
    return [item.chosen for item in task_studies(session)]


def make_choices(session: Session, missing: Sequence[tuple[str, str]], advance: Advance) -> None:
    """Choose the hyperparameters of every variant."""
    for item in _named(session, missing):
        product = item.trials
        trials = (
            product.read(session.run).set_index("trial", drop=False) if product.trials else pd.DataFrame()
        )
        rows = [_choice(item, variant, trials) for variant in item.variants]
        (name,) = item.chosen.units
        write_frame(session.run, name, STUDY_CHOSEN, pd.DataFrame(rows))


def _named(session: Session, keys: Sequence[tuple[str, str]]) -> list[TaskStudy]:
    return [item for item in task_studies(session) if item.key in set(keys)]


def _choice(item: TaskStudy, variant: Variant, trials: pd.DataFrame) -> dict[str, Any]:
    """A row of ``schemas.STUDY_CHOSEN``: the best of the variant's points, or the only one."""
    named = {**task_columns(item.task), "study": item.name, "variant": variant.name}
    keys = trials_of_variant(item.task, variant)
    if not keys:
        (point,) = variant.points
        return {**named, **{name: getattr(point, name) for name in POINT}, "n_candidates": 1}
    (row,) = choose(trials.loc[keys].reset_index(drop=True)).to_dict("records")
    return {**{str(name): value for name, value in row.items()}, **named}


def head_jobs(session: Session, item: TaskStudy) -> dict[Key, HeadToTrain]:
    """The heads of a study on a task; the file of one that the evaluate stage has trained is its own."""
    run, task = session.run, item.task
    (name,) = item.chosen.units
    rows = run.read_frame([required(run, name, "study")]).set_index("variant")
    others = set(run.names(heads(task, []).folder))
    jobs = {}
    for variant in item.variants:
        values = rows.loc[variant.name, POINT].to_dict()
        point = Hyperparameters(**{str(name): value for name, value in values.items()})
        for seed in session.config.seeds:
            job = study_head(task, item.name, variant, point, seed, _kept_file(session, item, variant, seed))
            there = head_file(task, point, seed, variant.scope, job.kept)
            jobs[variant.name, seed] = replace(job, file=there) if there in others else job
    return jobs


def _kept_file(session: Session, item: TaskStudy, variant: Variant, seed: int) -> str:
    """The head whose kept features a variant uses; "" where it keeps features by itself."""
    other = variant.scope.kept_on
    return head_file(session.tasks[other], item.facts.chosen[other]["head2toe"], seed) if other else ""


def head_products(session: Session) -> list[Files]:
    """The heads of every study and task."""
    return [
        study_heads(item.task, item.name, head_jobs(session, item).values()) for item in task_studies(session)
    ]


def prediction_product(session: Session, item: TaskStudy) -> RowFiles:
    """What the heads of a study predict for the test images of a task."""
    jobs = head_jobs(session, item)
    return study_predictions(item.task, item.name, jobs.values(), [list(key) for key in jobs])


def prediction_products(session: Session) -> list[RowFiles]:
    """The predictions of every study and task."""
    return [prediction_product(session, item) for item in task_studies(session)]


def make_predictions(session: Session, gaps: Sequence[Gap], advance: Advance) -> None:
    """Stream the test images through the heads of all studies that lack predictions."""
    lacking = {(gap.files.tag, gap.files.task) for gap in gaps}
    jobs = {item.key: head_jobs(session, item) for item in task_studies(session) if item.key in lacking}
    tables: dict[str, dict[str, list[HeadToTrain]]] = {}
    for (study, task), named in jobs.items():
        tables.setdefault(task, {})[study] = list(named.values())
    names = {key: list(named) for key, named in jobs.items()}
    stream_predictions(session, gaps, tables, partial(prediction_table, names), advance)


def prediction_table(
    names: Mapping[tuple[str, str], Sequence[Key]],
    task: TaskData,
    study: str,
    jobs: Sequence[HeadToTrain],
    index: np.ndarray,
    logits: np.ndarray,
) -> pa.Table:
    """Rows of ``schemas.STUDY_PREDICTIONS`` from logits float32 [n_heads, n, n_classes]."""
    keys, n = names[study, task.name], len(index)
    shared = {"backbone": backbone_folder(task.config), "task": task.name, "study": study}
    columns = {
        **{name: pa.repeat(pa.scalar(value), n * len(keys)) for name, value in shared.items()},
        "variant": pa.array(np.repeat([variant for variant, _ in keys], n), pa.string()),
        "seed": np.repeat(np.array([seed for _, seed in keys], np.int32), n),
        "index": np.tile(np.asarray(index, np.int32), len(keys)),
        "label": np.tile(task.labels["test"][index], len(keys)),
        "prediction": logits.argmax(2).astype(np.int32).reshape(-1),
    }
    return pa.table(columns, schema=STUDY_PREDICTIONS)


def result_product(item: TaskStudy, predicted: RowFiles) -> Files:
    """The result rows of a study on a task, which follow from its predictions."""
    return study_results(item.task, item.name, item.variants, predicted.key)


def result_products(session: Session) -> list[Files]:
    """The result rows of every study and task."""
    return [result_product(item, prediction_product(session, item)) for item in task_studies(session)]


def make_results(session: Session, missing: Sequence[tuple[str, str]], advance: Advance) -> None:
    """Write the result rows of every study and task."""
    for item in _named(session, missing):
        run, product = session.run, prediction_product(session, item)
        (choices,), (name,) = item.chosen.units, result_product(item, product).units
        predictions, chosen = run.read_frame(product.names(run)), run.read_frame([choices])
        write_rows(run, name, STUDY_RESULTS, result_rows(item, predictions, chosen))


def result_rows(item: TaskStudy, predictions: pd.DataFrame, chosen: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of ``schemas.STUDY_RESULTS``, from all predictions of a study on a task and what was chosen."""
    by_variant = {
        str(variant): rows.assign(right=rows["label"] == rows["prediction"]).pivot(
            index="seed", columns="index", values="right"
        )
        for variant, rows in predictions.groupby("variant", sort=False)
    }
    choices = chosen.set_index("variant")
    for variant in item.variants:
        right, choice = by_variant[variant.name], choices.loc[variant.name].to_dict()
        n_features, n_kept = _counts(item.facts, variant, choice)
        estimate = accuracy_estimate(right.to_numpy(bool))
        for seed, values in right.iterrows():
            yield {
                **task_columns(item.task),
                **{name: choice[name] for name in (*POINT, "validation_accuracy")},
                "study": item.name,
                "variant": variant.name,
                "series": variant.series,
                "x": variant.x,
                "seed": seed,
                "test_accuracy": float(values.mean()),
                "low": estimate.low,
                "high": estimate.high,
                **(_difference(right, by_variant[variant.reference]) if variant.reference else {}),
                "reference": variant.reference,
                "n_test": len(values),
                "n_correct": int(values.sum()),
                "n_train": len(item.task.subset("train", variant.scope.shots)),
                "n_classes": item.task.n_classes,
                "n_features": n_features,
                "n_kept": n_kept,
                "fingerprint": features_key(item.task, "train"),
            }


def _counts(facts: Facts, variant: Variant, choice: Mapping[Any, Any]) -> tuple[int, int]:
    """How many features are candidates, and how many the head reads."""
    layout = facts.layouts[int(choice["target_size"])]
    widths = dict(zip(layout.taps, layout.widths, strict=True))
    n_features = sum(widths[tap] for tap in variant.scope.taps or layout.taps)
    read = {
        "embedding": widths[facts.embedding],
        "all": n_features,
        "kept": int(n_features * float(choice["keep_fraction"])),
    }
    return n_features, read[METHODS[choice["method"]].features]


def _difference(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, float]:
    estimate = paired_difference(first.to_numpy(bool), second.to_numpy(bool))
    return {
        "difference": estimate.mean, "difference_low": estimate.low, "difference_high": estimate.high
    }  # fmt: skip


STEPS = (
    Step("study", "plans", lambda session: [], announce, brief=True),
    Step("study", "trials", trial_products, partial(make_trials, "study")),
    Step("choice", "choices", choice_products, make_choices, brief=True),
    Step("heads", "heads", head_products, train_heads),
    Step("evaluate", "predictions", prediction_products, make_predictions, count_rows),
    Step("results", "results", result_products, make_results, brief=True),
)
