"""Jobs as trials of Ray Tune: side by side on reused actors, retried if a worker dies.

A job's settings are the trial's configuration and its figures the trial's metrics, so that Tune's own tables
and TensorBoard show the work. What Tune writes of each trial as text or for TensorBoard is kept in the run
directory under ``tune/``; our results are files that the jobs write themselves.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from h2t.errors import UserError
from pipelines.run_directory import RunDirectory
from pipelines.session import Session
from pipelines.worker_errors import raise_user_error, user_error_of

KEPT_LOGS = (
    "params.json",
    "result.json",
    "progress.csv",
    "events.out.tfevents.*",
)  # Tune's others are pickles


@dataclass(frozen=True)
class Job:
    """Work of one Tune trial. ``name``: readable, part of file names; ``config``: plain values that say what
    it is; ``work``: what ``run`` is given; ``n_units``: how far its end advances the progress; ``memory``:
    bytes that are set apart for it."""

    name: str
    config: dict[str, Any]
    work: Any
    n_units: int = 1
    memory: int = 0


def run_jobs(
    session: Session,
    stage: str,
    jobs: Sequence[Job],
    run: Callable[[Any, Any], Iterator[dict[str, Any]]],
    shared: Any,
    *,
    resources: dict[str, float],
    concurrent: int | None,
    on_done: Callable[[Job], None],
    ready: Callable[[Job], bool] | None = None,
) -> None:
    """Call ``run(job.work, shared)`` in a trial for every job; what it yields are the trial's reports.

    ``shared`` is stored once and read by all trials; ``concurrent`` bounds the trials side by side (None: by
    ``resources`` alone); ``ready``: whether a job may begin yet, of those that wait for other work (None: all
    may), or NoMoreJobs. Raises UserError for a user's mistake in a job, or when jobs keep failing.
    """
    by_name = {job.name: job for job in jobs}
    payloads = {name: job.work for name, job in by_name.items()}
    memory = {name: job.memory for name, job in by_name.items()}
    space = [_described(job) for job in jobs]
    with tempfile.TemporaryDirectory() as scratch:
        outcome = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trainable, payloads=payloads, run=run, shared=shared),
                lambda config: _bundle(resources, memory[config["job"]["name"]]),
            ),
            param_space={} if ready else {"job": tune.grid_search(space)},
            tune_config=tune.TuneConfig(
                search_alg=_WhenReady(jobs, ready) if ready else None,
                num_samples=len(jobs) if ready else 1,
                reuse_actors=True,
                max_concurrent_trials=concurrent,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=stage,
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=session.config.resources.max_failures),
                callbacks=[_OnDone(lambda name: on_done(by_name[name]))],
            ),
        ).fit()
        _keep_logs(Path(scratch, stage), session.run, f"tune/{stage}")
    raise_user_error(str(result.metrics.get("user_error", "")) for result in outcome if result.metrics)
    if outcome.num_errors:
        first = str(outcome.errors[0])
        raise UserError(
            f"{outcome.num_errors} of {len(jobs)} trials failed; the first: {first}{_memory_advice(first)}"
        )


def _trainable(config: dict[str, Any], payloads: dict[str, Any], run: Any, shared: Any) -> None:
    def work() -> None:
        for metrics in run(payloads[config["job"]["name"]], shared):
            tune.report({**metrics, "user_error": ""})

    if user_error := user_error_of(work):
        tune.report({"user_error": user_error})


def _described(job: Job) -> dict[str, Any]:
    return {"name": job.name, **job.config}


class NoMoreJobs(Exception):
    """What jobs have waited for does not come."""


class _WhenReady(Searcher):
    """Jobs in their order, but for those that are not ready yet."""

    def __init__(self, jobs: Sequence[Job], ready: Callable[[Job], bool]) -> None:
        super().__init__(metric="user_error", mode="max")  # some metric that every report has
        self.jobs, self.ready = list(jobs), ready

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves it at the start, for a way to resume that is not used here

    def suggest(self, trial_id: str) -> Any:
        try:
            job = next(filter(self.ready, self.jobs), None)
        except NoMoreJobs:
            return Searcher.FINISHED
        if job is None:
            return None
        self.jobs.remove(job)
        return {"job": _described(job)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        pass


def _bundle(resources: dict[str, float], memory: int) -> tune.PlacementGroupFactory:
    named = {"CPU": resources["cpu"], "GPU": resources.get("gpu", 0), "memory": memory}
    return tune.PlacementGroupFactory([{name: amount for name, amount in named.items() if amount}])


def _trial_name(trial: Any) -> str:
    return str(trial.config["job"]["name"])


def _keep_logs(folder: Path, run: RunDirectory, destination: str) -> None:
    for pattern in KEPT_LOGS:
        for path in folder.glob(f"*/{pattern}"):
            run.write(f"{destination}/{path.relative_to(folder)}", path.read_bytes())


def _memory_advice(error: str) -> str:
    """Advice for a worker that Ray has killed for the memory it took; nothing for another error."""
    if "memory" not in error.lower():
        return ""
    return (
        "\nIf the node ran out of memory: lower resources.concurrent_trials or "
        "resources.memory_per_trial_gb, or raise finetune.gradient_accumulation where the backbone is trained"
    )


class _OnDone(tune.Callback):
    def __init__(self, on_done: Callable[[str], None]) -> None:
        self.on_done = on_done

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks at the start, for a way to resume that is not used here

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_done(_trial_name(trial))
