"""What is inside a file of ours or a run directory, in words and numbers: ``h2t inspect``."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from h2t.adapter import load_head
from h2t.errors import UserError
from h2t.finetuning import MODEL, read_metadata
from h2t.methods import METHODS
from pipelines.run_directory import RunDirectory
from pipelines.run_record import read_record

Facts = Iterator[tuple[str, str]]
SHOWN = 12  # values of a column, or classes, before the rest is counted


def describe(place: str) -> Facts:
    """Names and values. Raises UserError for what is neither a file of ours nor a run directory."""
    parent, name = RunDirectory.around(place.rstrip("/"))
    if not name.endswith((".safetensors", ".parquet")):
        return _run(RunDirectory(place))
    if not parent.exists(name):
        raise UserError(f"there is no file at '{place}'")
    if name.endswith(".parquet"):
        return _table(parent, name)
    data = parent.read(name)
    try:
        fine_tuned = MODEL in read_metadata(data)
    except ValueError:
        fine_tuned = False
    return _model(data) if fine_tuned else _head(data)


def _head(data: bytes) -> Facts:
    head, provenance = load_head(data)
    content = read_metadata(data)["head"]
    point, layout = head.hyperparameters, head.layout
    yield "file", f"an adapter: a head on a frozen backbone, {len(data):,} bytes, {content['format']}"
    yield (
        "method",
        f"{point.method}: {METHODS[point.method].title}" if point.method in METHODS else point.method,
    )
    yield "backbone", provenance.get("backbone", "not said")
    yield "trained on", provenance.get("task", "not said")
    yield (
        "classes",
        _listed(content["classes"]) if isinstance(content["classes"], list) else str(head.n_classes),
    )
    yield (
        "hyperparameters",
        ", ".join(f"{name} {value}" for name, value in content["hyperparameters"].items()),
    )
    yield "seed, training loss", f"{head.seed}, {head.train_loss:.4g} nats"
    kept = len(head.kept)
    yield "kept features", f"{kept:,} of {layout.n_features:,} ({kept / max(layout.n_features, 1):.2%})"
    counts = np.bincount(layout.tap_of(head.kept), minlength=len(layout.taps))
    most = np.argsort(-counts, kind="stable")[:SHOWN]
    yield "taps", f"{np.count_nonzero(counts)} of {len(layout.taps)} have kept features"
    yield "of most taps", ", ".join(f"{layout.taps[tap]} {counts[tap]}" for tap in most if counts[tap])
    yield (
        "weights",
        f"{head.weight.shape[0]:,} × {head.weight.shape[1]}, norm {np.linalg.norm(head.weight):.4g}",
    )
    yield "SHA-256 of tensors", content["sha256"]
    for name, value in provenance.items():
        if name not in ("backbone", "task"):
            yield name.replace("_", " "), value


def _model(data: bytes) -> Facts:
    described = read_metadata(data)[MODEL]
    yield "file", f"an adapter: a fine-tuned network with its head, {len(data):,} bytes"
    yield "precision", described["precision"]
    yield "features", f"target size {described['target_size']}, {len(described['taps'])} taps"
    yield "SHA-256 of tensors", described["sha256"]
    for name, value in described["content"].items():
        yield name.replace("_", " "), _listed(value) if isinstance(value, list) else _text(value)


def _table(parent: RunDirectory, name: str) -> Facts:
    with parent.open_table(name) as file:
        metadata, schema = file.metadata, file.schema_arrow
        taps = [field for field in schema if pa.types.is_fixed_size_list(field.type)]
        plain = [field.name for field in schema if not pa.types.is_nested(field.type)]
        kind = "features of frozen taps" if taps else "rows of a table"
        yield "file", f"Parquet, {kind}: {metadata.num_rows:,} rows in {metadata.num_row_groups} row groups"
        yield "written by", metadata.created_by
        yield "columns", f"{len(schema)}: {_listed([field.name for field in schema])}"
        if taps:
            widths = [field.type.list_size for field in taps]
            yield "features", f"{sum(widths):,} in {len(taps)} taps of {min(widths):,} to {max(widths):,}"
        table = file.read(plain)
    for column in plain:
        yield column, _values(table[column])


def _values(column: pa.ChunkedArray) -> str:
    counts = Counter(column.to_pylist())
    if len(counts) == 1:
        return str(next(iter(counts)))
    if pa.types.is_floating(column.type) or len(counts) > SHOWN:
        present = [value for value in counts if value is not None]
        ordered = sorted(present)
        return f"{len(counts):,} values, {_short(ordered[0])} to {_short(ordered[-1])}" if present else "none"
    return ", ".join(
        f"{value} ({count})" for value, count in sorted(counts.items(), key=lambda pair: str(pair[0]))
    )


def _run(run: RunDirectory) -> Facts:
    record = read_record(run)
    if not record:
        raise UserError(f"'{run.uri}' is neither a run directory nor a .safetensors or .parquet file")
    config = record["config"]
    yield "run", f"{config['name']}, fingerprint {record['fingerprint']}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    yield "backbone", _text({name: value for name, value in config["backbone"].items() if value is not None})
    yield "tasks", _listed([task["name"] for task in config["tasks"]])
    yield "methods", _listed(config["methods"])
    yield "seeds", _listed(config["seeds"])
    names = run.names("", recursive=True)
    folders = Counter(name.lstrip("/").partition("/")[0] for name in names)
    for folder, count in sorted(folders.items()):
        yield f"{folder}/" if count > 1 or "." not in folder else folder, f"{count:,} files"
    for kind in ("trials", "results"):
        rows = 0
        for name in run.keyed_names(kind, ".parquet", recursive=True):
            with run.open_table(name) as file:
                rows += file.metadata.num_rows
        yield f"rows of {kind}", f"{rows:,}"


def _listed(values: list[Any]) -> str:
    shown = ", ".join(map(str, values[:SHOWN]))
    return f"{shown} and {len(values) - SHOWN} more" if len(values) > SHOWN else shown


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
