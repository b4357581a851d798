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

from h2t.backbones.loading import load_backbone
from h2t.errors import UserError
from h2t.hyperparameters import Hyperparameters
from h2t.methods import METHODS
from pipelines.artifacts import Finetuning, checkpoint_file, finetuning, finetuning_key
from pipelines.choice import choose, without_diverged
from pipelines.cluster import Cluster
from pipelines.config import Config
from pipelines.finetune import STEPS, concurrent_trainings, run_job, run_trainings
from pipelines.finetune_trial import run_training
from pipelines.report import report
from pipelines.run import STAGES, run_stages, run_step
from pipelines.run_directory import RunDirectory
from pipelines.session import Session
from pipelines.task_data import TaskData, open_task
from tests.pipelines.conftest import kill_workers, output, run_all, small_config

pytestmark = pytest.mark.usefixtures("cluster")
TRAINED = {name for name, method in METHODS.items() if method.trains_backbone and not method.best_of}
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


def run_finetune(config: Config, run: RunDirectory, console: Console | None = None) -> int:
    """The stage alone; how many trials and models it made."""
    session = Session(config, run, console or Console(quiet=True))
    made = {step.unit: run_step(session, step, "finetune") for step in STEPS}
    return made["trials"] + made["models"]


def rows_of(run: RunDirectory, kind: str, of: str = "*") -> pd.DataFrame:
    return run.read_frame(str(p.relative_to(run.uri)) for p in Path(run.uri, kind).rglob(f"{of}/*.parquet"))


@pytest.fixture(scope="module")
def all_methods(images: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory(str(tmp_path_factory.mktemp("run")))
    config = config_of(images, weights, list(METHODS), grid={"target_size": [16], "steps": [5]})
    run_stages(config, run.uri, list(STAGES), Console(quiet=True))
    return run


def test_all_methods_have_results_in_the_same_columns(all_methods: RunDirectory) -> None:
    results = rows_of(all_methods, "results")
    assert results.groupby("method")["seed"].apply(list).to_dict() == {method: [0, 1] for method in METHODS}
    finetuned = rows_of(all_methods, "results", "finetuned")
    assert (finetuned["test_accuracy"] == finetuned["n_correct"] / finetuned["n_test"]).all()
    assert (finetuned["modelled_flops"] > 0).all()
    trials = rows_of(all_methods, "trials", "finetuned")
    assert trials.groupby("method").size().to_dict() == dict.fromkeys(TRAINED, 4)
    assert not list(Path(all_methods.uri, "checkpoints").rglob("*.safetensors"))


def test_trained_methods_alone_need_no_frozen_heads(
    images: Path, weights: str, tmp_path: Path, console: Console
) -> None:
    run, config = RunDirectory(str(tmp_path)), config_of(images, weights, ["scratch"])
    run_stages(config, run.uri, ["sweep", "evaluate"], console)
    assert run.names("", recursive=True) == ["/run.yaml"]


def test_head2toe_ft_plus_takes_what_validated_better(all_methods: RunDirectory) -> None:
    chosen = rows_of(all_methods, "chosen").set_index("method")["validation_accuracy"]
    better = "head2toe_ft" if chosen["head2toe_ft"] > chosen["head2toe"] else "head2toe"
    assert chosen["head2toe_ft_plus"] == chosen[better]
    results = rows_of(all_methods, "results").set_index(["method", "seed"])["test_accuracy"]
    assert results["head2toe_ft_plus"].to_dict() == results[better].to_dict()
    assert set(rows_of(all_methods, "chosen", "finetuned")["source"].dropna()) == {better}


def test_head2toe_ft_reads_what_the_frozen_head_kept(all_methods: RunDirectory) -> None:
    results = rows_of(all_methods, "results").set_index(["method", "seed"])
    columns = ["target_size", "keep_fraction", "coefficient", "n_kept", "n_features"]
    pd.testing.assert_frame_equal(results.loc["head2toe_ft", columns], results.loc["head2toe", columns])
    assert (results.loc["finetune", "weights"] == results.loc["head2toe", "weights"]).all()
    assert results.loc["scratch", "weights"].tolist() == ["random, seed 0", "random, seed 1"]


def test_fine_tuning_costs_all_of_what_fine_tuning_costs(all_methods: RunDirectory) -> None:
    """With batches of 8 too, where the frozen heads' and the paper's are of 128."""
    destination = RunDirectory(f"{all_methods.uri}/report")
    report([all_methods], destination, Console(quiet=True))
    shares = destination.read_frame(["costs.parquet"]).set_index("method")["flops_vs_finetuning"]
    assert shares[["finetune", "scratch"]].tolist() == pytest.approx([1, 1])
    assert shares["head2toe_ft"] > 1


def test_head2toe_ft_plus_may_come_and_go(all_methods: RunDirectory, images: Path, weights: str) -> None:
    def run_with(methods: list[str]) -> set[str]:
        config = config_of(images, weights, methods, grid={"target_size": [16], "steps": [5]})
        assert run_finetune(config, all_methods) == 0
        return set(rows_of(all_methods, "results", "finetuned")["method"])

    assert run_with([name for name in METHODS if not METHODS[name].best_of]) == TRAINED
    assert run_with(list(METHODS)) == TRAINED | {name for name in METHODS if METHODS[name].best_of}


@pytest.mark.slow
def test_a_lost_file_is_trained_again_to_the_same_rows(
    all_methods: RunDirectory, images: Path, weights: str, console: Console
) -> None:
    config = config_of(images, weights, list(METHODS), grid={"target_size": [16], "steps": [5]})
    order = ["method", "seed"]
    before = rows_of(all_methods, "results", "finetuned").sort_values(order, ignore_index=True)
    lost = [
        next(Path(all_methods.uri).rglob(name))
        for name in ("head2toe_ft-seed-1*", "scratch-rate-0.1*fold-1*.parquet")
    ]
    times = {path: path.stat().st_mtime_ns for path in Path(all_methods.uri).rglob("finetuned/*")}
    for path in (*lost, *Path(all_methods.uri, "results").rglob("finetuned/*")):
        path.unlink()
    assert run_finetune(config, all_methods) == 2
    after = rows_of(all_methods, "results", "finetuned").sort_values(order, ignore_index=True)
    measured = ["train_seconds", "peak_memory_bytes"]
    pd.testing.assert_frame_equal(after.drop(columns=measured), before.drop(columns=measured))
    rewritten = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert {path.name for path in rewritten if "results" not in path.parts} == {path.name for path in lost}
    assert run_finetune(config, all_methods, console) == 0
    assert output(console).count("nothing to do") == 3


def one_training(
    config: Config, steps: int = 4, rate: float = 0.1, fold: int | None = 0
) -> tuple[TaskData, Finetuning]:
    task = open_task(config, "first")
    point = Hyperparameters("finetune", 16, rate, steps)
    return task, finetuning(task, point, 0, fold, None)


def run_here(task: TaskData, member: Finetuning, run: RunDirectory) -> None:
    """A training in this process."""
    run_training(task, member, [], checkpoint_file(task, member), run)


def run_jobs_of(config: Config, run: RunDirectory, members: list[Finetuning]) -> None:
    """Trainings on a real Tune."""
    session = Session(config, run, Console(quiet=True))
    run_trainings("test", session, members, lambda count, note: None)


def test_a_training_that_diverges_leaves_a_row_with_its_step(
    images: Path, weights: str, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path))
    config = config_of(images, weights, ["finetune"], finetune={"learning_rate": [1e30, 0.1], "folds": 1})
    members = [one_training(config, steps=40, rate=rate)[1] for rate in (1e30, 0.1)]
    task = open_task(config, "first")
    for member in members:
        run_here(task, member, run)
    failed, done = (run.read_frame([member.file]).iloc[0] for member in members)
    assert failed["status"] == "failed"
    assert failed["learning_rate"] == 1e30
    assert 1 < failed["diverged_at"] <= 40
    assert np.isnan(failed["validation_accuracy"])
    assert done["status"] == "done"
    rows = run.read_frame(member.file for member in members)
    (chosen,) = choose(without_diverged(rows)).to_dict("records")
    assert chosen["learning_rate"] == 0.1
    with pytest.raises(UserError, match=r"first: the loss of finetune was not finite .*rate 1e\+30 at step"):
        without_diverged(rows[:1])


@pytest.mark.slow
def test_a_final_training_that_diverges_is_a_failed_result_that_the_report_counts(
    images: Path, weights: str, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path))
    finetune = {"learning_rate": [1e30], "steps": [40], "folds": 0}
    config = config_of(images, weights, ["scratch"], seeds=[0], finetune=finetune)
    run_all(config, run)
    (failed,) = rows_of(run, "results").to_dict("records")
    assert (failed["status"], failed["learning_rate"], failed["n_correct"]) == ("failed", 1e30, 0)
    assert 1 < failed["diverged_at"] <= 40
    assert np.isnan(failed["test_accuracy"])
    assert set(rows_of(run, "predictions")["prediction"]) == {-1}
    assert b"Trainings that failed: 1." in run.read("report/index.html")


def test_a_training_is_done_anew_when_its_inputs_change(images: Path, weights: str) -> None:
    def key(**finetune: Any) -> str:
        task = open_task(config_of(images, weights, ["finetune"], finetune=finetune), "first")
        return finetuning_key(task, "train")

    assert key() == key(checkpoint_every=7) == key(seeds=[1])
    assert key() != key(momentum=0.8)
    assert key() != key(workers_per_trial=2), "each worker has statistics of its own"
    frozen = {"batch_norm": "frozen"}
    assert key(**frozen) == key(**frozen, workers_per_trial=2)


def test_head2toe_ft_is_trained_anew_when_the_frozen_heads_are(images: Path, weights: str) -> None:
    def files(batch_size: int) -> list[str]:
        task = open_task(config_of(images, weights, ["finetune"], batch_size=batch_size), "first")
        base = Hyperparameters("head2toe", 16, 0.1, 5, 1e-5, 0.2)
        return [
            finetuning(task, replace(base, method="head2toe_ft"), 0, 0, base).file,
            finetuning(task, Hyperparameters("finetune", 16, 0.1, 5), 0, 0, None).file,
        ]

    (through_taps, finetuned), (other, same) = files(128), files(64)
    assert through_taps != other
    assert finetuned == same


def test_a_training_whose_file_is_there_is_not_done_again(images: Path, weights: str, tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    task, member = one_training(config_of(images, weights, ["finetune"]))
    run_here(task, member, run)
    written = run.read(member.file)
    shared = {"tasks": {"first": task}, "run": run, "resources": {}}
    (metrics,) = run_job((member, [], checkpoint_file(task, member)), shared)
    assert run.read(member.file) == written
    assert 0 <= metrics["validation_accuracy"] <= 1


def test_a_killed_worker_is_replaced_and_goes_on_from_its_checkpoint(
    images: Path, weights: str, tmp_path: Path
) -> None:
    run, undisturbed = RunDirectory(str(tmp_path / "killed")), RunDirectory(str(tmp_path / "undisturbed"))
    config = config_of(images, weights, ["finetune"])
    task, member = one_training(config, steps=80)
    checkpoint = checkpoint_file(task, member)
    seen: list[int] = []

    def kill() -> None:
        while not run.exists(checkpoint):
            time.sleep(0.02)
        assert kill_workers(b"ray::ImplicitFunc") == 1
        seen.append(int(load(run.read(checkpoint))["step"]))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run_jobs_of(config, run, [member])
    killer.join()
    assert 0 < seen[0] < 80
    assert not run.exists(checkpoint)
    run_here(task, member, undisturbed)
    rows = [directory.read_frame([member.file]).drop(columns="seconds") for directory in (run, undisturbed)]
    pd.testing.assert_frame_equal(*rows)


@pytest.mark.slow
def test_two_workers_train_what_one_does(images: Path, weights: str, tmp_path: Path) -> None:
    """In two parts each. Batch norm is frozen: on batch statistics every part would be normalised alone."""
    states = []
    for workers in (1, 2):
        finetune = {"batch_norm": "frozen", "workers_per_trial": workers, "gradient_accumulation": workers}
        config = config_of(images, weights, ["finetune"], finetune=finetune)
        run = RunDirectory(str(tmp_path / str(workers)))
        _, member = one_training(config, fold=None)
        run_jobs_of(config, run, [member])
        states.append(load(run.read(member.file)))
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
    images: Path, weights: str, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path))
    with pytest.raises(UserError, match="run the extract stage first"):
        run_finetune(config_of(images, weights, ["scratch"]), run)
    assert not run.names("", recursive=True)


def test_more_workers_than_the_cluster_holds_are_refused(
    images: Path, weights: str, cluster: Cluster
) -> None:
    config = config_of(images, weights, ["finetune"], finetune={"workers_per_trial": 5})
    with pytest.raises(UserError, match="5 workers of 1 CPUs and 0 GPUs do not fit the cluster's 4 CPUs"):
        concurrent_trainings(cluster, config)


@pytest.mark.slow
def test_a_mistake_that_only_the_workers_meet_is_one_message(
    images: Path, weights: str, tmp_path: Path
) -> None:
    config = config_of(images, weights, ["finetune"], finetune={"workers_per_trial": 2, "batch_size": 19})
    _, member = one_training(config, fold=None)
    with pytest.raises(UserError, match=r"the last batch of 20 training images has 1, fewer than"):
        run_jobs_of(config, RunDirectory(str(tmp_path)), [member])


@pytest.mark.parametrize(("asked", "expected"), [(3, 3), (None, 6)])
def test_trainings_of_several_workers_are_as_many_as_fit_and_at_most_those_asked_for(
    images: Path, weights: str, asked: int | None, expected: int
) -> None:
    large = Cluster(cpus=32, gpus=0, nodes=1, local=True, cores=30)
    finetune, resources = {"workers_per_trial": 5}, {"concurrent_trials": asked}
    config = config_of(images, weights, ["finetune"], finetune=finetune, resources=resources)
    assert concurrent_trainings(large, config) == expected
