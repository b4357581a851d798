"""Methods that train the backbone, on a real Ray: their rows, the two ways to run one, faults, resumption."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import load, save_file

from h2t import paper
from h2t.backbones.loading import load_backbone
from h2t.costs import BackboneCost
from h2t.errors import UserError
from h2t.methods import METHODS
from h2t.tasks import VTAB_1K
from pipelines.cluster import Cluster
from pipelines.config import Config
from pipelines.evaluate import evaluate
from pipelines.extract import extract, read_manifest
from pipelines.finetune import _run_piece, finetune, run_missing
from pipelines.finetune_trial import (
    TrainedTrial,
    checkpoint_file,
    run_trial,
    trained_search_space,
    trained_trial,
    training_fingerprint,
)
from pipelines.report.comparisons import affinity_table, cost_table
from pipelines.report.page import build_report
from pipelines.run import run_stages
from pipelines.run_directory import RunDirectory
from pipelines.sweep import sweep
from pipelines.task_data import TaskData, open_tasks
from pipelines.trained_selection import read_trained_selected, write_trained_selected
from tests.pipelines.conftest import kill_workers, output, small_config

pytestmark = pytest.mark.usefixtures("cluster")
SETTINGS = {"learning_rate": [0.1, 0.01], "steps": [4], "batch_size": 8, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of weights for the small backbone, so that it counts as pretrained."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = load_backbone("test_efficientnet", weights="random", image_size=32, seed=3).model
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return str(path)


def config_of(images: Path, weights: str, methods: list[str], **settings: Any) -> Config:
    return small_config(
        images,
        ("first",),
        methods=methods,
        backbone={"weights": weights},
        finetune={**SETTINGS, **settings.pop("finetune", {})},
        **settings,
    )


def run_trained(config: Config, run: RunDirectory, cluster: Cluster, console: Console | None = None) -> int:
    return finetune(config, open_tasks(config), run, cluster, console or Console(quiet=True))


def rows_of(run: RunDirectory, stage: str, kind: str = "*") -> pd.DataFrame:
    return run.read_frame(
        str(p.relative_to(run.uri)) for p in Path(run.uri, stage).rglob(f"kind={kind}/*.parquet")
    )


@pytest.fixture(scope="module")
def all_methods(
    images: Path, weights: str, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    run = RunDirectory(str(tmp_path_factory.mktemp("run")))
    config = config_of(images, weights, list(METHODS), grid={"target_size": [16], "steps": [5]})
    works = open_tasks(config)
    for stage in (extract, sweep, evaluate, finetune):
        stage(config, works, run, cluster, Console(quiet=True))
    return run


def test_all_nine_methods_have_results_in_the_same_columns(all_methods: RunDirectory) -> None:
    results = rows_of(all_methods, "results")
    assert results.groupby("method")["seed"].apply(list).to_dict() == {method: [0, 1] for method in METHODS}
    trained = rows_of(all_methods, "results", "trained")
    assert set(rows_of(all_methods, "results", "frozen")) <= set(trained)
    assert (trained["test_accuracy"] == trained["n_correct"] / trained["n_test"]).all()
    assert (trained["modelled_flops"] > 0).all()
    trials = rows_of(all_methods, "trials", "trained")
    assert trials.groupby("method").size().to_dict() == {"scratch": 4, "finetune": 4, "head2toe_ft": 4}
    assert set(rows_of(all_methods, "trials", "frozen")) <= set(trials)
    assert not list(Path(all_methods.uri, "checkpoints").rglob("*.safetensors"))


def test_trained_methods_alone_need_no_frozen_heads(
    images: Path, weights: str, tmp_path: Path, console: Console
) -> None:
    run, config = RunDirectory(str(tmp_path)), config_of(images, weights, ["scratch"])
    run_stages(config, run.uri, ["sweep", "evaluate"], console)
    assert "no method on frozen features" in output(console)
    assert run.names("", recursive=True) == ["/config.yaml"]


def test_head2toe_ft_plus_takes_what_validated_better(all_methods: RunDirectory) -> None:
    selected = rows_of(all_methods, "selected").set_index("method")["validation_accuracy"]
    better = "head2toe_ft" if selected["head2toe_ft"] > selected["head2toe"] else "head2toe"
    assert selected["head2toe_ft_plus"] == selected[better]
    results = rows_of(all_methods, "results").set_index(["method", "seed"])["test_accuracy"]
    assert results["head2toe_ft_plus"].to_dict() == results[better].to_dict()
    assert set(rows_of(all_methods, "selected", "trained")["source"].dropna()) == {better}


def test_head2toe_ft_reads_what_the_frozen_head_kept(all_methods: RunDirectory) -> None:
    results = rows_of(all_methods, "results").set_index(["method", "seed"])
    columns = ["target_size", "keep_fraction", "coefficient", "n_kept", "n_features"]
    pd.testing.assert_frame_equal(results.loc["head2toe_ft", columns], results.loc["head2toe", columns])
    assert (results.loc["finetune", "weights"] == results.loc["head2toe", "weights"]).all()
    assert results.loc["scratch", "weights"].tolist() == ["random, seed 0", "random, seed 1"]


def test_fine_tuning_costs_all_of_what_fine_tuning_costs(
    all_methods: RunDirectory, images: Path, weights: str
) -> None:
    """With batches of 8 too, where the frozen heads' and the paper's are of 128."""
    (work,) = open_tasks(config_of(images, weights, list(METHODS)))
    cost = BackboneCost(**read_manifest(work, all_methods)["cost"])
    table = cost_table(rows_of(all_methods, "results"), {"test_efficientnet": cost}).data
    shares = table.set_index("method")["flops_vs_finetuning"]
    assert shares[["finetune", "scratch"]].tolist() == pytest.approx([1, 1])
    assert shares["head2toe_ft"] > 1


def test_the_published_correlations_stand_beside_our_own() -> None:
    rows = [
        {"backbone": "resnet50", "task": task.name, "group": task.group, "method": method, "seed": 0,
         "test_accuracy": paper.accuracies("resnet50", method)[task.title] / 100}
        for method in ("linear", "head2toe", "scratch")
        for task in VTAB_1K
    ]  # fmt: skip
    table = affinity_table(pd.DataFrame(rows))
    assert table is not None
    assert "correlation of gain with affinity, resnet50: -0.79 over 19 tasks" in table.note
    assert "Table 1 gives -0.79 (ResNet-50) and -0.24 (ViT-B/16)" in table.note
    assert "0.87 for affinity between the two" in table.note


def test_head2toe_ft_plus_may_come_and_go(
    all_methods: RunDirectory, images: Path, weights: str, cluster: Cluster
) -> None:
    def run_with(methods: list[str]) -> set[str]:
        config = config_of(images, weights, methods, grid={"target_size": [16], "steps": [5]})
        assert run_trained(config, all_methods, cluster) == 0
        return set(rows_of(all_methods, "results", "trained")["method"])

    assert run_with(list(METHODS)[:-1]) == {"scratch", "finetune", "head2toe_ft"}
    assert run_with(list(METHODS)) == {"scratch", "finetune", "head2toe_ft", "head2toe_ft_plus"}


def test_what_is_lost_is_trained_again_to_the_same_rows(
    all_methods: RunDirectory, images: Path, weights: str, cluster: Cluster, console: Console
) -> None:
    config = config_of(images, weights, list(METHODS), grid={"target_size": [16], "steps": [5]})
    order = ["method", "seed"]
    before = rows_of(all_methods, "results", "trained").sort_values(order, ignore_index=True)
    lost = [
        next(Path(all_methods.uri).rglob(name))
        for name in ("head2toe_ft-seed-1*", "scratch-rate-0.1*fold-1*")
    ]
    times = {path: path.stat().st_mtime_ns for path in Path(all_methods.uri).rglob("kind=trained/*")}
    for path in (*lost, *Path(all_methods.uri, "results").rglob("kind=trained/*")):
        path.unlink()
    assert run_trained(config, all_methods, cluster) == 2
    after = rows_of(all_methods, "results", "trained").sort_values(order, ignore_index=True)
    measured = ["train_seconds", "peak_memory_bytes"]
    pd.testing.assert_frame_equal(after.drop(columns=measured), before.drop(columns=measured))
    rewritten = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert {path.name for path in rewritten if "results" not in path.parts} == {path.name for path in lost}
    assert run_trained(config, all_methods, cluster, console) == 0
    assert output(console).count("nothing to do") == 2


def one_trial(
    config: Config, steps: int = 4, rate: float = 0.1, fold: int | None = 0
) -> tuple[TaskData, TrainedTrial]:
    (work,) = open_tasks(config)
    settings = replace(trained_search_space(config, "finetune", None)[0], learning_rate=rate, steps=steps)
    return work, trained_trial(work, settings, 0, fold, None)


def test_a_training_that_diverges_leaves_a_row_with_its_step(
    images: Path, weights: str, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path))
    config = config_of(images, weights, ["finetune"], finetune={"learning_rate": [1e30, 0.1], "folds": 1})
    trials = [one_trial(config, steps=40, rate=rate)[1] for rate in (1e30, 0.1)]
    work = open_tasks(config)[0]
    for trial in trials:
        run_trial(work, trial, None, run)
    failed, done = (run.read_frame([trial.file]).iloc[0] for trial in trials)
    assert failed["status"] == "failed"
    assert failed["learning_rate"] == 1e30
    assert 1 < failed["diverged_at"] <= 40
    assert np.isnan(failed["validation_accuracy"])
    assert done["status"] == "done"
    write_trained_selected(work, trials, None, run)
    (chosen,) = read_trained_selected(work, trials, run)
    assert chosen.learning_rate == 0.1
    with pytest.raises(UserError, match=r"first: the loss of finetune was not finite .*rate 1e\+30 at step"):
        write_trained_selected(work, trials[:1], None, run)


def test_a_final_training_that_diverges_is_a_failed_result_that_the_report_counts(
    images: Path, weights: str, cluster: Cluster, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path))
    finetune = {"learning_rate": [1e30], "steps": [40], "folds": 0}
    config = config_of(images, weights, ["scratch"], seeds=[0], finetune=finetune)
    extract(config, open_tasks(config), run, cluster, Console(quiet=True))
    run_trained(config, run, cluster)
    (failed,) = rows_of(run, "results").to_dict("records")
    assert (failed["status"], failed["learning_rate"], failed["n_correct"]) == ("failed", 1e30, 0)
    assert 1 < failed["diverged_at"] <= 40
    assert np.isnan(failed["test_accuracy"])
    assert set(rows_of(run, "predictions")["scratch_seed0"]) == {-1}
    page = build_report(rows_of(run, "results"), pd.DataFrame(), pd.DataFrame(), None, {})["index.html"]
    assert b"Trainings that failed: 1." in page


def test_a_training_is_done_anew_when_what_it_depends_on_changes(images: Path, weights: str) -> None:
    def fingerprint(**finetune: Any) -> str:
        return training_fingerprint(
            open_tasks(config_of(images, weights, ["finetune"], finetune=finetune))[0]
        )

    assert fingerprint() == fingerprint(checkpoint_every=7) == fingerprint(seeds=[1])
    assert fingerprint() != fingerprint(momentum=0.8)
    assert fingerprint() != fingerprint(workers_per_trial=2), "each worker has statistics of its own"
    frozen = {"batch_norm": "frozen"}
    assert fingerprint(**frozen) == fingerprint(**frozen, workers_per_trial=2)


def test_head2toe_ft_is_trained_anew_when_the_frozen_heads_are(images: Path, weights: str) -> None:
    def files(batch_size: int) -> list[str]:
        (work,) = open_tasks(config_of(images, weights, ["finetune"], batch_size=batch_size))
        points = (replace(trained_search_space(work.config, "finetune", None)[0], method=name)
                  for name in ("head2toe_ft", "finetune"))  # fmt: skip
        return [
            trained_trial(work, point, 0, 0, point if point.method == "head2toe_ft" else None).file
            for point in points
        ]

    (through_taps, finetuned), (other, same) = files(128), files(64)
    assert through_taps != other
    assert finetuned == same


def test_a_training_whose_file_is_there_is_not_done_again(images: Path, weights: str, tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    work, trial = one_trial(config_of(images, weights, ["finetune"]))
    run.write(trial.file, b"written before the worker died")
    _run_piece(0, {"trials": [trial], "works": {"first": work}, "run": run})
    assert run.read(trial.file) == b"written before the worker died"


def test_a_killed_worker_is_replaced_and_goes_on_from_its_checkpoint(
    images: Path, weights: str, cluster: Cluster, tmp_path: Path
) -> None:
    run, undisturbed = RunDirectory(str(tmp_path / "killed")), RunDirectory(str(tmp_path / "undisturbed"))
    config = config_of(images, weights, ["finetune"])
    work, trial = one_trial(config, steps=80)
    checkpoint = checkpoint_file(work, trial)
    seen: list[int] = []

    def kill() -> None:
        while not run.exists(checkpoint):
            time.sleep(0.02)
        assert kill_workers(b"ray::ImplicitFunc") == 1
        seen.append(int(load(run.read(checkpoint))["step"]))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run_missing(config, [work], {"first": [trial]}, "trials", run, cluster, Console(quiet=True))
    killer.join()
    assert 0 < seen[0] < 80
    assert not run.exists(checkpoint)
    run_trial(work, trial, None, undisturbed)
    rows = [directory.read_frame([trial.file]).drop(columns="seconds") for directory in (run, undisturbed)]
    pd.testing.assert_frame_equal(*rows)


def test_two_workers_train_what_one_does(
    images: Path, weights: str, cluster: Cluster, tmp_path: Path
) -> None:
    """In two parts each. Batch norm is frozen: on batch statistics every part would be normalised alone."""
    states = []
    for workers in (1, 2):
        finetune = {"batch_norm": "frozen", "workers_per_trial": workers, "gradient_accumulation": workers}
        config = config_of(images, weights, ["finetune"], finetune=finetune)
        run = RunDirectory(str(tmp_path / str(workers)))
        work, trial = one_trial(config, fold=None)
        run_missing(config, [work], {"first": [trial]}, "heads", run, cluster, Console(quiet=True))
        states.append(load(run.read(trial.file)))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        (["finetune"], {"backbone": {"weights": "random"}}, "finetune start from pretrained weights"),
        (["head2toe_ft"], {}, "head2toe_ft builds on head2toe"),
        (["scratch"], {"finetune": {"folds": 3}}, r"at most cross_validation.n_folds \(2\), got 3"),
        (["scratch"], {"finetune": {"folds": 0}}, "folds: 0 leaves nothing to choose by"),
        (["scratch"], {"finetune": {"seeds": [5]}}, r"expected some of seeds \[0, 1\], got \[5\]"),
    ],
)
def test_recipes_that_can_not_work_are_refused(
    images: Path, weights: str, methods: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small_config(
            images,
            ("first",),
            methods=methods,
            **{"backbone": {"weights": weights}, "finetune": SETTINGS, **changes},
        )


def test_a_stage_that_is_missing_is_named_before_anything_is_trained(
    images: Path, weights: str, cluster: Cluster, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path))
    with pytest.raises(UserError, match="run the extract stage first"):
        run_trained(config_of(images, weights, ["scratch"]), run, cluster)
    assert not run.names("", recursive=True)


def test_more_workers_than_the_cluster_holds_are_refused(
    images: Path, weights: str, cluster: Cluster, tmp_path: Path
) -> None:
    config = config_of(images, weights, ["finetune"], finetune={"workers_per_trial": 5})
    work, trial = one_trial(config)
    with pytest.raises(UserError, match="5 workers of 1 CPUs and 0 GPUs do not fit the cluster's 4 CPUs"):
        run_missing(
            config, [work], {"first": [trial]}, "trials", RunDirectory(str(tmp_path)), cluster, Console()
        )


def test_a_mistake_that_only_the_workers_meet_is_one_message(
    images: Path, weights: str, cluster: Cluster, tmp_path: Path
) -> None:
    config = config_of(images, weights, ["finetune"], finetune={"workers_per_trial": 2, "batch_size": 19})
    work, trial = one_trial(config, fold=None)
    with pytest.raises(UserError, match=r"^finetune: the last batch of 20 training images has 1, fewer than"):
        run_missing(
            config, [work], {"first": [trial]}, "heads", RunDirectory(str(tmp_path)), cluster, Console()
        )


def test_trials_of_several_workers_are_as_many_as_fit_and_at_most_those_asked_for(
    images: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("pipelines.finetune.run_trials", lambda *_, at_once, **__: asked.append(at_once))
    large = Cluster(cpus=32, gpus=0, nodes=1, local=True, cores=30)
    for concurrent in (3, None):
        resources = {"concurrent_trials": concurrent}
        finetune = {"workers_per_trial": 5}
        config = config_of(images, weights, ["finetune"], finetune=finetune, resources=resources)
        work, trial = one_trial(config)
        run_missing(
            config, [work], {"first": [trial]}, "trials", RunDirectory(str(tmp_path)), large, Console()
        )
    assert asked == [3, 6]
