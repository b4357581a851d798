"""A disk or store that does not answer, or takes nothing more: one message, and no file is called damaged."""

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer
from rich.console import Console

from h2t.errors import UserError
from h2t.images.remote import open_root, read_files
from pipelines.cluster import Cluster
from pipelines.products import RowFiles, is_whole
from pipelines.run import STAGES, run_stages
from pipelines.run_directory import RunDirectory, Unreachable
from pipelines.status import StepNote, StepRecorder
from tests.pipelines.conftest import small_config


class Store:
    """A server that speaks the S3 protocol, which goes away and comes back with what it holds."""

    def __init__(self) -> None:
        self.port = 0
        self.come()
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", **keys).create_bucket(Bucket="runs")

    def come(self) -> None:
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def go(self) -> None:
        self.server.stop()

    def uri(self, bucket: str) -> str:
        options = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"
        return f"s3://test:test@{bucket}?{options}"


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.go()


def test_a_store_that_is_away_says_nothing_of_its_files(store: Store) -> None:
    run = RunDirectory(store.uri("runs/away"))
    run.write_table("t/whole.parquet", pa.table({"x": [1]}))
    run.write("t/half.parquet", b"PAR1")
    assert [is_whole(run, f"t/{name}.parquet") for name in ("whole", "half")] == [True, False]

    def is_damaged(name: str) -> bool:
        store.go()
        return not is_whole(run, name)

    with pytest.raises(
        Unreachable, match=r"t/half.parquet cannot be reached: .*nothing there was changed"
    ) as error:
        run.archive_all("t", is_damaged, "damaged")
    assert "test:test" not in str(error.value)  # the keys
    store.come()
    assert run.names("t") == ["t/half.parquet", "t/whole.parquet"]
    assert run.names("damaged", recursive=True) == []


@pytest.mark.slow
def test_every_way_to_a_store_that_is_away_is_one_message(store: Store) -> None:
    run = RunDirectory(store.uri("runs/away"))
    run.write_json("value.json", 1)
    run.write("t/rows-000000-000001-abc.parquet", b"")
    store.go()
    table = RowFiles("t", "abc", "task", "train", 1, 0, "extract", np.zeros(1, np.int32))
    for ask in (
        lambda: is_whole(run, "value.json"),
        lambda: table.is_whole(run, table.name(0, 1)),
        lambda: run.exists("value.json"),
        lambda: run.size("value.json"),
        lambda: run.write("other", b""),
        lambda: run.delete("value.json"),
        lambda: run.names("t"),
    ):
        with pytest.raises(Unreachable, match=r"cannot be reached: .*Could not connect to server"):
            ask()
    filesystem, _ = open_root(store.uri("runs"))
    with pytest.raises(UserError, match=r"cannot be read: .*try again once its disk or store answers"):
        read_files(filesystem, ["runs/away/value.json"])  # which is no bad image
    store.come()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["features", "trials", "predictions"])
@pytest.mark.timeout(400)
def test_a_store_that_goes_in_mid_run_ends_it_and_the_same_command_goes_on(
    images: Path, cluster: Cluster, store: Store, moment: str
) -> None:
    config = small_config(images, ("first",), methods=["linear"])
    run = RunDirectory(store.uri(f"runs/{moment}"))
    gone = threading.Event()

    def leave() -> None:
        while not run.names(moment, recursive=True):
            time.sleep(0.05)
        store.go()
        gone.set()

    threading.Thread(target=leave, daemon=True).start()
    with pytest.raises(UserError, match=r"cannot be reached|cannot be read"):
        run_stages(config, run.uri, list(STAGES)[:3], Console(quiet=True))
    assert gone.is_set()
    store.come()
    before = set(run.names(moment, recursive=True))
    run_stages(config, run.uri, list(STAGES)[:3], Console(quiet=True))
    assert before <= set(run.names(moment, recursive=True))
    assert run.names("damaged", recursive=True) == []
    assert len(run.read_frame(run.names("results", recursive=True))) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte and of five files and folders."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=6", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_takes_no_more_files_or_turns_read_only(small_disk: Path) -> None:
    run = RunDirectory(str(small_disk / "run"))
    for name in "abcd":
        run.write(name, b"x")
    for name in ("e", "deep/er"):
        with pytest.raises(
            UserError, match=rf"no room left for .*{name}: No space left on device; make room"
        ):
            run.write(name, b"x")
    run.delete("d")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for change in (lambda: run.write("d", b"x"), lambda: run.delete("a")):
        with pytest.raises(UserError, match=r"cannot be (written|reached): Read-only file system; .*goes on"):
            change()


def test_the_note_of_a_step_does_not_hide_what_ended_it(small_disk: Path) -> None:
    run = RunDirectory(str(small_disk / "run"))

    def step() -> None:
        with StepRecorder(run, StepNote("extract", "extract", 0, "images", 1)) as recorder:
            subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
            recorder.note.updated = 0
            recorder.advance(1, "task")
            raise UserError("what ended it")

    with pytest.raises(UserError, match="what ended it"):
        step()
