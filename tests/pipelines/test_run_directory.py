import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from h2t.errors import UserError
from pipelines.run_directory import RunDirectory


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDirectory:
    if request.param == "local":
        return RunDirectory(str(tmp_path))
    endpoint = request.getfixturevalue("s3")
    return RunDirectory(
        f"s3://runs/{tmp_path.name}?endpoint_override={endpoint}&scheme=http&allow_bucket_creation=true"
    )


def test_files_come_back_as_written(run: RunDirectory) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", "y"]})
    run.write("deep/er/bytes.bin", b"abc")
    run.write_json("value.json", {"k": [1, 2]})
    run.write_table("t/one.parquet", table)
    run.write_table("t/two.parquet", table)
    assert run.read("deep/er/bytes.bin") == b"abc"
    assert run.read("deep/er/bytes.bin", 2) == b"ab"
    assert run.size("deep/er/bytes.bin") == 3
    assert run.read_json("value.json") == {"k": [1, 2]}
    assert len(run.read_frame(run.names("t"))) == 4
    assert run.names("t") == ["t/one.parquet", "t/two.parquet"]
    assert run.exists("value.json")
    assert not run.exists("t")
    assert run.names("nothing") == []


def test_asking_whether_it_can_be_written_leaves_nothing_behind(run: RunDirectory, tmp_path: Path) -> None:
    run.require_writable()
    assert run.names("") == []
    RunDirectory(str(tmp_path / "new" / "run")).require_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="can't write to the run directory"):
        RunDirectory(str(tmp_path / place)).require_writable()


def test_a_bucket_that_is_not_there_is_one_message(s3: str) -> None:
    for address in (f"s3://nothing/run?endpoint_override={s3}&scheme=http", "s3://"):
        with pytest.raises(UserError, match="can't write to the run directory"):
            RunDirectory(address).require_writable()


def test_a_file_whose_writing_fails_never_appears(run: RunDirectory) -> None:
    def write_half(name: str) -> None:
        with run.writing(name) as sink:
            sink.write(b"half")
            raise KeyboardInterrupt

    run.write("folder/old", b"old")
    for name in ("folder/new", "folder/old"):
        with pytest.raises(KeyboardInterrupt):
            write_half(name)
    assert run.names("folder") == ["folder/old"]
    assert run.read("folder/old") == b"old"


def test_files_are_archived_and_restored(run: RunDirectory) -> None:
    run.write("trials/a-1", b"1")
    run.write("trials/b-2", b"2")
    assert run.archive_all("trials", lambda name: name.endswith("1"), "superseded") == ["trials/a-1"]
    assert run.names("trials") == ["trials/b-2"]
    assert run.restore_all("trials", lambda name, location: False, "superseded") == []
    seen = run.restore_all("trials", lambda name, location: location == f"superseded/{name}", "superseded")
    assert seen == ["trials/a-1"]
    assert run.read("trials/a-1") == b"1"
    assert run.names("superseded/trials") == []


def test_a_file_that_was_made_anew_is_not_replaced_by_an_archived_one(run: RunDirectory) -> None:
    run.write("trials/a", b"old")
    run.archive_all("trials", lambda name: True, "superseded")
    run.write("trials/a", b"new")
    assert run.restore_all("trials", lambda name, location: True, "superseded") == []
    assert run.read("trials/a") == b"new"


def test_the_temporary_files_of_a_killed_writer_are_deleted(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / ".tmp-1234-part").write_bytes(b"half")
    assert run.archive_all("t", lambda name: True, "superseded") == []
    assert list((tmp_path / "t").iterdir()) == []


def test_a_folder_in_it_is_a_run_directory_with_the_same_options(run: RunDirectory) -> None:
    run.subdirectory("report").write("index.html", b"page")
    assert run.read("report/index.html") == b"page"


def test_an_address_that_is_none() -> None:
    with pytest.raises(UserError, match="expected a local path or a URI"):
        RunDirectory("ftpx://somewhere/run")


def test_a_link_in_a_run_directory_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.parquet").write_bytes(b"a user's")
    run = RunDirectory(str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to(outside)
    for folder in ("features", "features/b/t"):
        with pytest.raises(UserError, match="is a link to"):
            run.archive_all(folder, lambda name: True, "superseded")
    assert (outside / "precious.parquet").exists()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_message_and_nothing_half_written_stays(full_disk: Path) -> None:
    run = RunDirectory(str(full_disk / "run"))
    run.write("small", b"kept")
    with pytest.raises(UserError, match=r"no room left for .*large: No space left on device; make room"):
        run.write("large", bytes(2 << 20))
    with pytest.raises(UserError, match=r"no room left for .*table"):
        run.write_table("table.parquet", pa.table({"x": np.random.default_rng(0).random(300_000)}))
    assert [path.name for path in (full_disk / "run").iterdir()] == ["small"]
