"""``run.yaml``: the configuration of a run with its fingerprint and the versions of the packages.

It is written once per configuration: a later command with the same recipe leaves it as it is, so that it says
what the files were made with. Records of earlier configurations are kept in ``history/``.
"""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from h2t.errors import UserError
from pipelines.config import Config, fingerprint
from pipelines.run_directory import RunDirectory

LAYOUT = 2  # of run directories; one of another layout is refused
RECORD = "run.yaml"
PACKAGES = ("head2toe-ray", "numpy", "pillow", "pyarrow", "ray", "timm", "torch")


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or 1.2 may take for a number or a date, such as 1e3."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if value[:1].isalpha() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def package_versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # of this one, where it runs from a folder
            found[name] = version(name)
    return found


def write_record(config: Config, run: RunDirectory) -> None:
    """Write the record of a configuration, unless it is there. Raises UserError as ``read_record`` does.

    It leaves out which studies are asked for, which changes nothing else.
    """
    record, config = read_record(run), config.model_copy(update={"studies": [], "control": None})
    current = fingerprint(config)
    if record.get("fingerprint") == current:
        return
    if record:
        run.write(f"history/run-{record['fingerprint']}.yaml", run.read(RECORD))
    content = {
        "layout": LAYOUT,
        "fingerprint": current,
        "packages": package_versions(),
        "config": config.model_dump(mode="json"),
    }
    run.write(RECORD, yaml.dump(content, Dumper=_Dumper, sort_keys=False).encode())


def read_record(run: RunDirectory) -> dict[str, Any]:
    """The record of a run directory; empty where there is none.

    Raises UserError for a run directory of another layout.
    """
    if run.exists("config.yaml"):
        record: dict[str, Any] = {"layout": 1}  # which had no number
    elif run.exists(RECORD):
        record = yaml.safe_load(run.read(RECORD))
    else:
        return {}
    if record.get("layout") != LAYOUT:
        raise UserError(
            f"{run.uri} has layout {record.get('layout')}, expected {LAYOUT}: it was written by another "
            "version of this package; run into another directory, or move that one away"
        )
    return record
