"""``run.yaml``: written once per configuration, kept, and refused where the layout is another."""

from pathlib import Path

import pytest
import yaml
from ruamel.yaml import YAML

from h2t.errors import UserError
from pipelines.run_directory import RunDirectory
from pipelines.run_record import read_record, write_record
from tests.pipelines.conftest import small_config


def test_a_record_is_written_once_per_configuration_and_kept(images: Path, tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    write_record(small_config(images), run)
    record = read_record(run)
    assert record["config"]["seeds"] == [0, 1]
    run.write("run.yaml", yaml.safe_dump({**record, "packages": {"torch": "of then"}}).encode())
    write_record(small_config(images), run)
    assert read_record(run)["packages"] == {"torch": "of then"}
    write_record(small_config(images, seeds=[0]), run)
    assert read_record(run)["config"]["seeds"] == [0]
    history = yaml.safe_load(run.read(f"history/run-{record['fingerprint']}.yaml"))
    assert history["packages"] == {"torch": "of then"}


@pytest.mark.parametrize(
    "name", ["1e3", "007", "2024-01-01", "0o17", "12_0", "1.5", "yes", "null", "0x1F", "nan"]
)
def test_names_like_numbers_and_dates_stay_text(images: Path, tmp_path: Path, name: str) -> None:
    run = RunDirectory(str(tmp_path))
    write_record(small_config(images, name=name), run)
    for read in (yaml.safe_load, YAML(typ="safe", pure=True).load):
        assert read(run.read("run.yaml"))["config"]["name"] == name


@pytest.mark.parametrize(
    ("name", "content"), [("config.yaml", b"fingerprint: abc\n"), ("run.yaml", b"layout: 7\n")]
)
def test_a_directory_of_another_layout_is_refused(
    images: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    run = RunDirectory(str(tmp_path))
    run.write(name, content)
    with pytest.raises(UserError, match="layout"):
        write_record(small_config(images), run)
