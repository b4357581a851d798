"""What the report is made from: the rows of run directories, read from their files alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset

from h2t.costs import BackboneCost
from h2t.errors import UserError
from h2t.methods import METHODS
from h2t.parquet_bounds import check_expansion
from pipelines.report.paired import Correctness, correctness
from pipelines.run_directory import RunDirectory, of_storage, open_filesystem, unreachable
from pipelines.run_record import read_record
from pipelines.schemas import (
    BAD_ROWS,
    CHOSEN,
    EXPLANATIONS,
    KEPT,
    PREDICTIONS,
    RESULTS,
    STUDY_RESULTS,
    THUMBNAILS,
    TRIALS,
)

DONE = "done"
SCHEMAS = {
    "results": RESULTS, "trials": TRIALS, "chosen": CHOSEN, "kept": KEPT, "predictions": PREDICTIONS,
    "bad_rows": BAD_ROWS, "study_results": STUDY_RESULTS, "thumbnails": THUMBNAILS,
    "explanations": EXPLANATIONS,
}  # fmt: skip
"""Kind of rows -> columns of its Parquet files; accuracies are fractions of 1."""
FOLDERS = {"study_results": "studies/results"}
"""Folder of a kind in a run directory, where that is not its name."""
RECIPES = "studies/recipes"
"""Folder of the run directories of studies of other features: <study>/<variant>."""


@dataclass(frozen=True)
class Frames:
    """Everything that the report knows of one or several runs.

    The data frames have the columns of ``SCHEMAS``; tasks, methods and seeds may be missing from any of them.
    ``costs``: backbone -> what was measured of it. ``provenance``: plain values, nested as you like.
    ``recipes``: (study, variant) -> the frames of a run with other features, for a study of those.
    ``asked``: (task, method) of all that the recipes of the runs ask for.
    """

    results: pd.DataFrame = field(default_factory=SCHEMAS["results"].empty_table().to_pandas)
    trials: pd.DataFrame = field(default_factory=SCHEMAS["trials"].empty_table().to_pandas)
    chosen: pd.DataFrame = field(default_factory=SCHEMAS["chosen"].empty_table().to_pandas)
    kept: pd.DataFrame = field(default_factory=SCHEMAS["kept"].empty_table().to_pandas)
    predictions: pd.DataFrame = field(default_factory=SCHEMAS["predictions"].empty_table().to_pandas)
    bad_rows: pd.DataFrame = field(default_factory=SCHEMAS["bad_rows"].empty_table().to_pandas)
    study_results: pd.DataFrame = field(default_factory=SCHEMAS["study_results"].empty_table().to_pandas)
    thumbnails: pd.DataFrame = field(default_factory=SCHEMAS["thumbnails"].empty_table().to_pandas)
    explanations: pd.DataFrame = field(default_factory=SCHEMAS["explanations"].empty_table().to_pandas)
    costs: Mapping[str, BackboneCost] = field(default_factory=dict)
    recipes: Mapping[tuple[str, str], "Frames"] = field(default_factory=dict)
    asked: frozenset[tuple[str, str]] = frozenset()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def correctness(self) -> Correctness:
        """Which test images every training got right."""
        return correctness(self.predictions)

    @property
    def finished(self) -> pd.DataFrame:
        """The result rows of trainings that ended well."""
        return self.results[(self.results["status"] == DONE) & self.results["test_accuracy"].notna()]

    @property
    def missing(self) -> dict[str, list[str]]:
        """Method -> the tasks that it has no result for, of all that were asked for."""
        there = set(zip(self.results["task"], self.results["method"], strict=True))
        found: dict[str, list[str]] = {}
        for task, method in sorted(self.asked - there):
            found.setdefault(method, []).append(task)
        return found

    @property
    def backbones(self) -> list[str]:
        """The backbones of results and kept features by name."""
        return sorted({*self.results["backbone"], *self.kept["backbone"]})


def model_name(backbone: str) -> str:
    """The backbone without the run that ``read_runs`` may have put behind it."""
    return backbone.partition(" (")[0]


def read_runs(runs: Sequence[RunDirectory]) -> Frames:
    """The rows of all runs; a backbone that several of them have is called ``backbone (run)`` in each.

    Raises UserError for a directory of another layout, and for files that cannot be read.
    """
    runs = list(dict.fromkeys(runs))
    parts = [read_run(run) for run in runs]
    if len(parts) == 1:
        return parts[0]
    titles = [open_filesystem(run.uri)[1].rstrip("/").rpartition("/")[2] for run in runs]
    if len(set(titles)) < len(titles):  # sweep-1/run and sweep-2/run
        titles = [run.uri for run in runs]
    holders = Counter(backbone for part in parts for backbone in {*part.backbones, *part.costs})
    parts = [
        _renamed(part, {name: f"{name} ({title})" for name, count in holders.items() if count > 1})
        for part, title in zip(parts, titles, strict=True)
    ]
    return Frames(
        **{kind: pd.concat([getattr(part, kind) for part in parts], ignore_index=True) for kind in SCHEMAS},
        costs={backbone: cost for part in parts for backbone, cost in part.costs.items()},
        recipes=_together([part.recipes for part in parts]),
        asked=frozenset(pair for part in parts for pair in part.asked),
        provenance={
            f"{title}: {name}": value
            for part, title in zip(parts, titles, strict=True)
            for name, value in part.provenance.items()
        },
    )


def read_run(run: RunDirectory) -> Frames:
    """The rows of one run directory, what was measured of its backbones, and what its files say of it."""
    record = read_record(run)
    manifests = {
        (name.split("/")[1], content["task"]): content
        for name in run.keyed_names("manifests", ".json", recursive=True)
        for content in [run.read_json(name)]
    }
    return Frames(
        **{kind: _read_rows(run, kind) for kind in SCHEMAS},
        costs={backbone: BackboneCost(**content["cost"]) for (backbone, _), content in manifests.items()},
        recipes={
            (study, variant): read_run(run.subdirectory(f"{RECIPES}/{study}/{variant}"))
            for study, variant in sorted(
                {
                    tuple(name.removeprefix(f"{RECIPES}/").split("/")[:2])
                    for name in run.names(RECIPES, recursive=True)
                    if name.endswith("/run.yaml")
                }
            )
        },
        asked=frozenset(
            (task["name"], method)
            for task in record.get("config", {}).get("tasks", [])
            for method in record.get("config", {}).get("methods", [])
        ),
        provenance=_provenance(record, manifests, len(run.names("history"))),
    )


def _renamed(frames: Frames, titles: Mapping[str, str]) -> Frames:
    rows = {
        kind: getattr(frames, kind).assign(backbone=lambda data: data["backbone"].replace(titles))
        for kind in SCHEMAS
    }
    costs = {titles.get(backbone, backbone): cost for backbone, cost in frames.costs.items()}
    recipes = {key: _renamed(part, titles) for key, part in frames.recipes.items()}
    return replace(frames, **rows, costs=costs, recipes=recipes)


def _together(parts: Sequence[Mapping[tuple[str, str], Frames]]) -> dict[tuple[str, str], Frames]:
    """The recipes of studies of several runs: the results and predictions of each, below one another."""
    together: dict[tuple[str, str], Frames] = {}
    for key, frames in (item for part in parts for item in part.items()):
        before = together.get(key, Frames())
        together[key] = Frames(
            **{
                kind: pd.concat([getattr(before, kind), getattr(frames, kind)], ignore_index=True)
                for kind in ("results", "predictions")
            }
        )
    return together


def _read_rows(run: RunDirectory, kind: str) -> pd.DataFrame:
    """All rows of a folder; files are read side by side, since an object store is slow to answer."""
    names = run.keyed_names(FOLDERS.get(kind, kind), ".parquet", recursive=True)
    filesystem, root = open_filesystem(run.uri)
    paths = [f"{root.rstrip('/')}/{name}" for name in names]
    try:
        rows = pa.dataset.dataset(
            paths, schema=SCHEMAS[kind], filesystem=filesystem, format="parquet", partitioning=None
        )
        fragments = list(rows.get_fragments())
        with ThreadPoolExecutor() as pool:
            footers = list(pool.map(lambda fragment: fragment.metadata, fragments))
        for footer, name in zip(footers, names, strict=True):
            check_expansion(footer, name)
        frame: pd.DataFrame = rows.to_table().to_pandas()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and of_storage(error):
            raise unreachable(f"{kind} of {root}", error) from None
        raise UserError(f"can't read {kind} of {run.uri}: {error}; run its recipe again") from None
    return frame


def _provenance(
    record: Mapping[str, Any], manifests: Mapping[tuple[str, str], Mapping[str, Any]], n_earlier: int
) -> dict[str, Any]:
    """What ``run.yaml`` and the manifests say; nothing about the machine or the versions of this moment."""
    config = record.get("config", {})
    backbones = {backbone: content.get("backbone", {}) for (backbone, _), content in manifests.items()}
    one_backbone = len(backbones) == 1
    extracted = {str(content.get("packages")): content.get("packages") for content in manifests.values()}
    values = {
        "recipe": config.get("name") if record else "not known: run.yaml is missing",
        "earlier configurations": f"{n_earlier}, in history/" if n_earlier else None,
        "fingerprint": record.get("fingerprint"),
        "backbone": next(iter(backbones.values())) if one_backbone else backbones,
        "images": {
            task if one_backbone else f"{task}, {backbone}": content.get("images")
            for (backbone, task), content in manifests.items()
        },
        "grid": config.get("grid"),
        "cross-validation": config.get("cross_validation"),
        "fine-tuning": config.get("finetune") if _trains_backbones(config) else None,
        "packages": record.get("packages"),
        "packages of the features": [v for v in extracted.values() if v != record.get("packages")],
    }
    return {name: value for name, value in values.items() if value}


def _trains_backbones(config: Mapping[str, Any]) -> bool:
    methods = config.get("methods", [])
    return any(METHODS[method].trains_backbone for method in methods if method in METHODS)
