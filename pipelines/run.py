"""Runs stages: finds out what is missing in the run directory and has it made."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console

from h2t.device import slow_in_bfloat16
from h2t.errors import UserError
from h2t.heads.tap_kernels import check_rows
from h2t.methods import METHODS
from pipelines import evaluate, extract, finetune, grams, study, sweep
from pipelines.config import Config
from pipelines.lock import locked
from pipelines.progress import StageProgress
from pipelines.run_directory import RunDirectory, damaged_file
from pipelines.run_record import write_record
from pipelines.session import Advance, Background, Product, Session, Step
from pipelines.status import StepNote, StepRecorder, by_tasks

STAGES: dict[str, Sequence[Step]] = {
    "extract": (*extract.STEPS, *grams.STEPS),
    "sweep": sweep.STEPS,
    "evaluate": evaluate.STEPS,
    "finetune": finetune.STEPS,
    "study": study.STEPS,
}


def run_stages(
    config: Config, uri: str, stages: Sequence[str], console: Console, address: str | None = None
) -> dict[str, float]:
    """Run some of the stages, each as far as its files are missing; wall seconds of each.

    Raises UserError for what the user can mend, before any work where it can be known by then; so also where
    another driver is at work in the directory.
    """
    session = Session(config, RunDirectory(uri), console, address)
    for task in session.tasks.values():  # images that are not there are told before anything is written
        if task.left_out:
            first = task.left_out[0]
            console.print(f"{task.name}: {len(task.left_out)} files, such as {first.path}: {first.reason}")
    if any(METHODS[name].by_tap for name in config.methods):
        for task in session.tasks.values():
            check_rows(max(len(task.labels[split]) for split in task.stored_splits))
    if address is None and "bfloat16" in precisions(config) and slow_in_bfloat16():
        console.print(
            "bfloat16 is about ten times slower than float32 on this processor, which has no AVX-512: "
            "choose float32 for backbone.precision, head_precision and finetune.precision"
        )
    seconds: dict[str, float] = {}
    with locked(session.run):
        write_record(config, session.run)
        mended: set[str] = set()
        while True:
            try:
                _run_in_turn(session, stages, seconds)
                break
            except UserError as error:  # of a file that was found to be damaged when it was used
                name = damaged_file(error)
                if not name or name in mended or not session.run.exists(name):
                    raise
                mended.add(name)
                session.run.archive_all(name.rpartition("/")[0], name.__eq__, "damaged")
                console.print(f"{error}: moved to damaged/ and made again")
        if "study" in stages:
            seconds["study"] += run_recipes(config, uri, console, address)
    return seconds


def _run_in_turn(session: Session, stages: Sequence[str], seconds: dict[str, float]) -> None:
    """Run stages, but for those that can run side by side; adds to the ``seconds`` of each."""

    def run_stage(stage: str) -> None:
        started = time.monotonic()
        for step in STAGES[stage]:
            run_step(session, step, stage)
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - started

    waiting = list(stages)
    if waiting[:2] == ["extract", "sweep"] and sweeps_what_comes(session):
        waiting = waiting[2:]
        session.extraction = Background(lambda: run_stage("extract"))
        session.extraction.start()
        try:
            run_stage("sweep")
        except Exception:
            session.extraction.wait()  # which may have failed first, and goes on with what it has begun
            raise
        else:
            session.extraction.wait()
        finally:
            session.extraction = None
    for stage in waiting:
        run_stage(stage)


def sweeps_what_comes(session: Session) -> bool:
    """Whether a task's trials run while the features of others are computed.

    On GPUs, that is: the last actors of an extraction leave some idle. On a CPU nothing would be won.
    """
    run, products = session.run, extract.STEPS[0].products(session)
    return any(product.missing(run, run.names(product.folder)) for product in products) and bool(
        session.cluster.gpus
    )


def run_recipes(config: Config, uri: str, console: Console, address: str | None) -> float:
    """Run the variants of a recipe that its studies ask for, each in a directory of its own; seconds."""
    started = time.monotonic()
    for name, variants in study.recipes(config).items():
        if not variants:
            console.print(f"{'study':<9} {name}: {config.backbone.name} has nothing to compare")
        for folder, recipe in variants.items():
            console.print(f"{'study':<9} {name}: the recipe with {folder.rpartition('/')[2]}")
            destination = RunDirectory(uri).subdirectory(folder)
            run_stages(recipe, destination.uri, ["extract", "sweep", "evaluate"], console, address)
    return time.monotonic() - started


def precisions(config: Config) -> set[str]:
    """Everything that a run computes in."""
    finetuned = any(METHODS[method].trains_backbone for method in config.methods)
    return {
        config.backbone.precision, config.head_precision, *([config.finetune.precision] if finetuned else [])
    }  # fmt: skip


def run_step(session: Session, step: Step, stage: str) -> int:
    """Set aside what is stale or damaged and make what is missing; how many units that was."""
    products = step.products(session)
    missing = [unit for product in products for unit in _reconcile(session, step, product)]
    total = step.count(missing)
    if step.brief:
        step.make(session, missing, lambda count, note: None)
    elif missing:
        position = list(STAGES).index(stage) * 10 + STAGES[stage].index(step)
        by_task = {task: step.count(units) for task, units in by_tasks(missing).items()}
        note = StepNote(stage, step.title, position, step.unit, total, by_task)
        with (
            StageProgress(session.console, step.title, total, step.unit) as progress,
            StepRecorder(session.run, note) as recorder,
        ):
            step.make(session, missing, in_both(progress.advance, recorder.advance))
    elif products:
        session.console.print(f"{step.title:<9} nothing to do: all {step.unit} are there")
    return total


def in_both(first: Advance, second: Advance) -> Advance:
    """Count for the screen and for the run directory."""

    def advance(count: int, place: str) -> None:
        first(count, place)
        second(count, place)

    return advance


def _reconcile(session: Session, step: Step, product: Product) -> list[Any]:
    """The units that a product lacks, once its folder holds whole files of this configuration alone."""
    run = session.run
    stale = run.archive_all(
        product.folder, lambda name: not product.is_current(run, name, name), "superseded"
    )
    run.restore_all(product.folder, partial(product.is_current, run), "superseded")
    damaged = run.archive_all(product.folder, lambda name: not product.is_whole(run, name), "damaged")
    if stale:
        session.console.print(
            f"{step.title:<9} {len(stale)} files of another configuration moved to superseded/"
        )
    for name in damaged:
        session.console.print(f"{step.title:<9} {name} is damaged: moved to damaged/ and made again")
    return product.missing(run, run.names(product.folder))
