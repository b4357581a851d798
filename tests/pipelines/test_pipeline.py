"""The whole pipeline on a real Ray: equal results however it is run, and only what is missing is done."""

import hashlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from h2t.errors import UserError
from pipelines import shard_stream
from pipelines.artifacts import features
from pipelines.cluster import Cluster, backbone_actors, trial_resources
from pipelines.config import Config
from pipelines.products import Shard, shards
from pipelines.report import report
from pipelines.run import STAGES, run_stages
from pipelines.run_directory import RunDirectory
from pipelines.session import Session
from pipelines.shard_stream import process_shards
from pipelines.task_data import open_task
from tests.pipelines.conftest import (
    MEASURED,
    frame,
    output,
    result_rows,
    run_all,
    small_config,
    write_task,
)

pytestmark = pytest.mark.usefixtures("cluster")


def digests(run: RunDirectory) -> dict[str, str]:
    """Every file but those that hold measured times, by name."""
    root = Path(run.uri)
    files = [path for path in root.rglob("*") if path.is_file() and "report" not in path.parts]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not {"trials", "results", "heads", "tune", "status"} & set(path.relative_to(root).parts)
    }


def test_every_stage_leaves_its_rows(finished: RunDirectory, images: Path) -> None:
    results = result_rows(finished)
    assert set(results["method"]) == {"linear", "all_l2", "all_l1", "all_l21", "head2toe"}
    assert len(results) == 2 * 5 * 2
    assert set(results.loc[results["task"] == "second", "n_test"]) == {9}
    assert (results["test_accuracy"] == results["n_correct"] / results["n_test"]).all()
    trials = frame(finished, "trials")
    points = {"linear": 2, "all_l2": 4, "all_l1": 4, "all_l21": 4, "head2toe": 8}
    assert trials.groupby("method").size().to_dict() == {m: 2 * 2 * n for m, n in points.items()}
    assert frame(finished, "chosen").groupby(["task", "method"]).size().eq(1).all()
    kept = frame(finished, "kept").groupby(["task", "method", "seed"])["n_kept"].sum()
    assert (kept == results.set_index(["task", "method", "seed"])["n_kept"]).all()
    assert finished.exists("report/index.html")


def test_features_are_plain_lists_of_the_right_rows(finished: RunDirectory, images: Path) -> None:
    names = features(open_task(small_config(images), "first"), "train", 16).names(finished)
    table = finished.read_table(names)
    assert table["index"].to_pylist() == list(range(20))
    assert table["label"].to_pylist() == [0, 1] * 10
    assert table.schema.field("pre_logits").type.value_type == "float"
    assert [name.rpartition("/")[2][:18] for name in names] == [
        "rows-000000-000008", "rows-000008-000016", "rows-000016-000020",
    ]  # fmt: skip


def test_running_again_does_nothing_and_says_so(
    finished: RunDirectory, images: Path, console: Console
) -> None:
    before = digests(finished)
    run_all(small_config(images), finished, console)
    assert digests(finished) == before
    assert output(console).count("nothing to do") == 4


@pytest.mark.parametrize(
    "kind", ["features", "trials", "chosen", "heads", "predictions", "results", "kept", "manifests"]
)
def test_a_deleted_file_is_made_again_and_nothing_else(
    finished: RunDirectory, images: Path, tmp_path: Path, kind: str
) -> None:
    run = RunDirectory(str(tmp_path / "run"))  # a copy: the status of the other says what its own run did
    shutil.copytree(finished.uri, run.uri)
    before, rows = digests(run), result_rows(run)
    victim = next(
        name for name in run.names(kind, recursive=True) if name.endswith(("parquet", "tensors", "json"))
    )
    times = {path: path.stat().st_mtime_ns for path in Path(run.uri).rglob("*.parquet")}
    (Path(run.uri) / victim).unlink()
    run_all(small_config(images), run)
    assert digests(run) == before
    pd.testing.assert_frame_equal(result_rows(run), rows)
    rewritten = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    parts = {path.relative_to(run.uri).parts[0] for path in rewritten}
    assert parts - {"report"} <= {kind}


def test_results_do_not_depend_on_workers_on_packs_or_on_stages_side_by_side(
    finished: RunDirectory, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.run.sweeps_what_comes", lambda session: True)  # as on GPUs
    two = {"actors": 2, "concurrent_trials": 2, "points_per_trial": 5}
    run, stages = RunDirectory(str(tmp_path)), list(STAGES)[:3]
    run_stages(small_config(images, resources=two), run.uri, stages, Console(quiet=True))
    pd.testing.assert_frame_equal(
        result_rows(run).drop(columns="validation_accuracy"),
        result_rows(finished).drop(columns="validation_accuracy"),
    )
    np.testing.assert_allclose(
        result_rows(run)["validation_accuracy"], result_rows(finished)["validation_accuracy"]
    )


def test_trials_that_wait_for_features_end_with_what_these_have_failed_by(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.run.sweeps_what_comes", lambda session: True)
    write_task(tmp_path / "images", "first")
    file = tmp_path / "images" / "first" / "train.parquet"
    table = pq.read_table(file)
    broken = [*table["image_bytes"].to_pylist()[:-1], b"no image"]
    pq.write_table(table.set_column(0, "image_bytes", [broken]), file)
    config = small_config(tmp_path / "images", ("first",))
    with pytest.raises(UserError, match="1 bad images"):
        run_stages(config, str(tmp_path / "run"), ["extract", "sweep"], Console(quiet=True))
    assert RunDirectory(str(tmp_path / "run")).names("trials", recursive=True) == []


@pytest.mark.slow
def test_another_setting_never_mixes_with_what_was_there(
    finished: RunDirectory, images: Path, tmp_path: Path, console: Console
) -> None:
    shutil.copytree(finished.uri, tmp_path / "run")
    run = RunDirectory(str(tmp_path / "run"))
    other = small_config(images, grid={"learning_rate": [0.01]})
    run_stages(other, run.uri, list(STAGES)[:3], console)
    assert set(frame(run, "trials")["learning_rate"]) == {0.01}
    assert set(result_rows(run)["learning_rate"]) == {0.01}
    assert "of another configuration moved to superseded/" in output(console)
    text = output(console)
    run_stages(small_config(images), run.uri, list(STAGES)[:3], console)
    pd.testing.assert_frame_equal(result_rows(run), result_rows(finished))
    assert run.names("trials", recursive=True) == finished.names("trials", recursive=True)
    assert "nothing to do: all trials are there" in output(console)[len(text) :]


def broken(images: Path, tmp_path: Path) -> Path:
    """Copies the first task with two images that can't be decoded."""
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        table = pq.read_table(images / "first" / f"{split}.parquet").to_pydict()
        table["image_bytes"][3] = b"not an image"
        folder = tmp_path / "first"
        folder.mkdir(exist_ok=True)
        pq.write_table(pyarrow.table(table), folder / f"{split}.parquet")
    return tmp_path


def test_bad_images_are_refused_with_their_rows(images: Path, tmp_path: Path) -> None:
    root = broken(images, tmp_path)
    config = small_config(root, ("first",))
    with pytest.raises(UserError, match=r"first/train row 3 .*"):
        run_stages(config, str(tmp_path / "run"), ["extract"], Console(quiet=True))


def test_bad_images_are_skipped_counted_and_listed_where_asked(images: Path, tmp_path: Path) -> None:
    root = broken(images, tmp_path)
    config = small_config(root, ("first",), on_bad_image="skip")
    run = RunDirectory(str(tmp_path / "run"))
    run_all(config, run)
    assert set(result_rows(run)["n_test"]) == {11}
    bad = frame(run, "bad_rows")
    assert sorted(zip(bad["split"], bad["index"], strict=True)) == [("test", 3), ("train", 3)]
    assert b"not an image: it begins with" in run.read("report/index.html")


class CannotStart:
    def __init__(self) -> None:
        raise UserError("no weights on this node")


class CannotWork:
    def __call__(self, *shard: object) -> None:
        raise UserError("no room on this node")


def process(session: Session, step: Callable[[], Any]) -> None:
    """Take the training images of the first task through a step."""
    product = features(session.tasks["first"], "train", 16)
    missing = shards(product.missing(session.run, []), 8)
    process_shards(session, missing, step, lambda count, note: None)


@pytest.mark.parametrize(("step", "message"), [(CannotStart, "no weights on"), (CannotWork, "no room on")])
def test_a_mistake_that_only_a_worker_sees_is_one_message(
    images: Path, tmp_path: Path, console: Console, step: type, message: str
) -> None:
    session = Session(small_config(images, ("first",)), RunDirectory(str(tmp_path)), console)
    with pytest.raises(UserError, match=f"^{message} this node$"):
        process(session, step)


def test_images_that_a_worker_cannot_find_are_one_message(
    images: Path, tmp_path: Path, console: Console
) -> None:
    shutil.copytree(images, tmp_path / "images")
    config = small_config(tmp_path / "images", ("first",))
    session = Session(config, RunDirectory(str(tmp_path / "run")), console)
    _ = features(session.tasks["first"], "train", 16)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(UserError, match="every node must see the same files"):
        process(session, dict)


def test_resources_that_can_never_work_are_refused_at_once(images: Path, cluster: Cluster) -> None:
    starving = small_config(images, resources={"actors": 4}).resources
    with pytest.raises(UserError, match="leave none of the cluster's 4 CPUs for reading"):
        backbone_actors(cluster, starving)
    gpus = small_config(images, resources={"gpus_per_actor": 1.0, "gpus_per_trial": 1.0}).resources
    with pytest.raises(UserError, match="the cluster has 0"):
        backbone_actors(cluster, gpus)
    with pytest.raises(UserError, match="does not fit"):
        trial_resources(cluster, gpus)


def test_fewer_images_than_folds_are_refused_before_anything_runs(images: Path, tmp_path: Path) -> None:
    config = small_config(images, cross_validation={"n_folds": 21})
    with pytest.raises(UserError, match="cannot cut 20 training images into 21 folds"):
        run_stages(config, str(tmp_path), ["extract"], Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_stages_out_of_order_say_what_to_run_first(images: Path, tmp_path: Path) -> None:
    config: Config = small_config(images)
    for stage, first in (("sweep", "extract"), ("evaluate", "sweep")):
        with pytest.raises(UserError, match=f"run the {first} stage first"):
            run_stages(config, str(tmp_path / stage), [stage], Console(quiet=True))
    run = RunDirectory(str(tmp_path))
    with pytest.raises(UserError, match="run the evaluate stage first"):
        report([run], run, Console(quiet=True))


@pytest.mark.slow
def test_a_run_in_an_object_store_has_the_same_rows_and_goes_on(
    finished: RunDirectory, images: Path, s3: str, console: Console
) -> None:
    """With credentials in the URI: the workers were started before the server was."""
    options = f"endpoint_override={s3}&scheme=http&region=us-east-1"
    run = RunDirectory(f"s3://test:test@runs/pipeline?{options}")
    config = small_config(images, ("first",))
    run_all(config, run)
    names = run.names("results", recursive=True)
    rows = [where.read_frame(names).drop(columns=MEASURED) for where in (run, finished)]
    pd.testing.assert_frame_equal(*rows)
    victim = run.names("trials", recursive=True)[0]
    run.delete(victim)
    run_all(config, run, console)
    assert run.exists(victim)
    assert output(console).count("nothing to do") == 3


class SlowStep:
    """Tells of two batches of four images, seconds apart."""

    def __call__(
        self, task: object, shard: object, images: list, index: object, seen: Callable[[int], None]
    ) -> None:
        for start in range(0, len(images), 4):
            seen(len(images[start : start + 4]))
            time.sleep(1.0)


def test_progress_moves_within_a_shard_and_ends_at_its_images(
    images: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_stream, "LOOKED_EVERY_S", 0.1)
    session = Session(small_config(images), RunDirectory(str(tmp_path)), Console(quiet=True))
    missing = shards(features(session.tasks["first"], "train", 16).missing(session.run, []), 20)
    counted: list[int] = []
    process_shards(session, missing, SlowStep, lambda count, place: counted.append(count))
    assert sum(counted) == 20
    assert len(counted) >= 3


class StuckStep:
    """Does nothing for long, but for the first images."""

    def __call__(self, task: Any, shard: Shard, pixels: Any, index: Any, seen: Callable[[int], None]) -> None:
        seen(3)
        time.sleep(45)  # and not longer: its actor holds a processor of the cluster of all tests


class VerySlowStep:
    """An image every two seconds."""

    def __call__(
        self, task: Any, shard: Shard, pixels: list, index: Any, seen: Callable[[int], None]
    ) -> None:
        for _ in pixels:
            time.sleep(2)
            seen(1)


@pytest.mark.slow
@pytest.mark.parametrize("step", [VerySlowStep, StuckStep])
def test_slow_is_not_stuck(images: Path, cluster: Cluster, tmp_path: Path, step: Any) -> None:
    """A shard that takes longer than the limit goes on as long as images are done."""
    config = small_config(images, resources={"no_progress_timeout_s": 20, "shard_size": 20})
    session = Session(config, RunDirectory(str(tmp_path)), Console(quiet=True))
    missing = shards(features(session.tasks["first"], "train", 16).missing(session.run, []), 20)
    if step is VerySlowStep:
        process_shards(session, missing, step, lambda count, place: None)
        return
    with pytest.raises(UserError, match="no image was read or computed for 20 s; 3 of 20 images are done"):
        process_shards(session, missing, step, lambda count, place: None)
    while any("StreamingExecutor" in thread.name for thread in threading.enumerate()):
        time.sleep(0.5)  # as long as the actor sleeps: other tests use this cluster too


def test_rows_come_as_long_as_something_moves(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_stream, "LOOKED_EVERY_S", 0.02)
    config = small_config(images)
    object.__setattr__(config.resources, "no_progress_timeout_s", 0.3)  # less than a recipe may ask for
    shard, never = Shard("t", "train", 0, 10, ()), threading.Event()
    counted = shard_stream.CountedImages(None, [shard], lambda count, place: None)  # type: ignore[arg-type]

    def rows(stuck: bool) -> Iterator[dict[str, Any]]:
        yield {"row": 0}
        for _ in range(10):  # slower than the limit in all
            time.sleep(0.06)
            counted.moved = time.monotonic()
        counted._tell("t/train", 4)
        if stuck:
            never.wait(5)
        yield {"row": 1}

    assert [row["row"] for row in shard_stream.watched(rows(False), counted, config)] == [0, 1]
    with pytest.raises(UserError, match="no image was read or computed for 0 s; 4 of 10 images are done"):
        list(shard_stream.watched(rows(True), counted, config))
    free = iter([True, True, False])  # others hold the devices, twice
    with pytest.raises(UserError, match="no image was read"):
        list(shard_stream.watched(rows(True), counted, config, lambda: next(free)))
    assert next(free, None) is None
    never.set()
    with pytest.raises(ZeroDivisionError):
        list(shard_stream.watched((1 // 0 for _ in "x"), counted, config))  # type: ignore[misc]


def test_a_shard_that_is_done_twice_counts_once() -> None:
    counted: list[int] = []
    shard = Shard("t", "train", 0, 10, ())
    images = shard_stream.CountedImages(None, [shard], lambda count, place: counted.append(count))  # type: ignore[arg-type]
    images._tell("t/train", 6)
    images._tell("t/train", 14)  # four of them again, by another worker
    images.finish("t/train", 10)
    assert counted == [6, 4]


class DeadlyStep:
    """Kills its worker at the first rows, and does the others."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def __call__(self, task: Any, shard: Shard, *_: object) -> None:
        if shard.start == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.run.write(f"done-{shard.start}", b"")


def test_a_shard_that_kills_its_workers_is_told_and_the_others_are_done(images: Path, tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    session = Session(small_config(images), run, Console(quiet=True))
    missing = shards(features(session.tasks["first"], "train", 16).missing(run, []), 8)
    message = (
        "1 of 3 shards took 3 workers with them, such as rows 0 to 7 of first/train; the others are done"
    )
    with pytest.raises(UserError, match=message):
        process_shards(session, missing, partial(DeadlyStep, run), lambda count, place: None)
    assert {path.name for path in tmp_path.iterdir()} == {"done-8", "done-16"}
