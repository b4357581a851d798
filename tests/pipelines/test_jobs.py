"""Jobs on Ray Tune: what a user of Tune sees of them, and what is heard of jobs that fail."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from h2t.errors import UserError
from pipelines.artifacts import trials
from pipelines.cross_validation import as_jobs, packed
from pipelines.jobs import Job, run_jobs
from pipelines.run_directory import RunDirectory
from pipelines.session import Session
from tests.pipelines.conftest import small_config

pytestmark = pytest.mark.usefixtures("cluster")


def work(number: int, shared: dict[int, Exception]) -> Iterator[dict[str, Any]]:
    if number in shared:
        raise shared[number]
    yield {"best": number / 10}


def run_two(tmp_path: Path, images: Path, shared: dict[int, Exception]) -> list[str]:
    """Two jobs, "job-0" and "job-1"; the names of those that were done."""
    session = Session(
        small_config(images, resources={"max_failures": 0}), RunDirectory(str(tmp_path)), Console(quiet=True)
    )
    done: list[str] = []
    jobs = [Job(f"job-{number}", {"task": "first", "fold": number}, number) for number in range(2)]
    run_jobs(
        session, "stage", jobs, work, shared,
        resources={"cpu": 1}, concurrent=1, on_done=lambda job: done.append(job.name),
    )  # fmt: skip
    return done


@pytest.mark.parametrize(
    ("reason", "advised"),
    [
        pytest.param("no such file", False, marks=pytest.mark.slow),
        ("the node ran low on memory", True),
    ],
)
def test_a_job_that_keeps_failing_is_one_message(
    images: Path, tmp_path: Path, reason: str, advised: bool
) -> None:
    with pytest.raises(UserError, match=rf"1 of 2 trials failed; the first: (?s:.*){reason}") as caught:
        run_two(tmp_path, images, {0: RuntimeError(reason)})
    assert ("lower resources.concurrent_trials" in str(caught.value)) is advised


def test_a_users_mistake_in_a_job_is_that_message_alone(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no such weights$"):
        run_two(tmp_path, images, {1: UserError("no such weights")})


def test_tune_shows_names_settings_and_figures_and_no_pickle_is_kept(images: Path, tmp_path: Path) -> None:
    assert run_two(tmp_path, images, {}) == ["job-0", "job-1"]
    folder = tmp_path / "tune" / "stage"
    (line,) = (folder / "job-1" / "result.json").read_text().splitlines()
    result = json.loads(line)
    assert result["best"] == 0.1
    assert result["config"]["job"] == {"name": "job-1", "task": "first", "fold": 1}
    kept = {path.name.partition(".")[0] for path in folder.rglob("*") if path.is_file()}
    assert kept == {"params", "result", "progress", "events"}


def test_the_sweep_in_tune_is_the_cross_validation(finished: RunDirectory) -> None:
    results = [
        json.loads(line)
        for path in Path(finished.uri, "tune", "sweep").glob("*/result.json")
        for line in path.read_text().splitlines()
    ]
    n_points = {
        (r["config"]["job"]["task"], r["config"]["job"]["target_size"], r["fold"]): r["n_points"]
        for r in results
    }
    assert set(n_points) == {
        (task, size, fold) for task in ("first", "second") for size in (16, 64) for fold in (0, 1)
    }
    rows = finished.read_frame(finished.names("trials", recursive=True))
    assert sum(n_points.values()) == len(rows)
    assert max(r["best_validation_accuracy"] for r in results) == rows["validation_accuracy"].max()


def test_packs_are_cut_by_points_and_jobs_by_slots(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(images, resources={"points_per_trial": 4})
    session = Session(config, RunDirectory(str(tmp_path)), Console(quiet=True))
    members = [trial for task in session.tasks.values() for trial in trials(task).trials]
    for n_slots in (1, 2, 64):
        packs = packed(session, members, n_slots)
        assert sorted(trial.key for pack in packs for trial in pack.trials) == sorted(t.key for t in members)
        assert max(len(pack.trials) for pack in packs) <= 4
        assert len({pack.file for pack in packs}) == len(packs)
        jobs = as_jobs(session, packs, n_slots)
        assert sum(job.n_units for job in jobs) == len(members)
        assert len({job.name for job in jobs}) == len(jobs)
        assert len(jobs) == len({(job.config["task"], job.config["target_size"]) for job in jobs})
    monkeypatch.setattr("pipelines.cross_validation.LEAST_FLOPS", 0)
    for n_slots in (1, 2, 64):
        packs = packed(session, members, n_slots)
        assert len(as_jobs(session, packs, n_slots)) >= min(len(packs), 4 * n_slots) / 2
