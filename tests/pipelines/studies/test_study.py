"""The studies that need training, on a real Ray: what must hold of each, and that nothing is done twice."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from h2t.adapter import load_head
from h2t.errors import UserError
from h2t.head2toe import Head
from pipelines.cluster import Cluster
from pipelines.config import Config
from pipelines.report import report
from pipelines.run import STAGES, run_stages
from pipelines.run_directory import RunDirectory
from pipelines.studies import find_study, study_names
from pipelines.variants import Study
from tests.pipelines.conftest import frame, output, small_config

ON_HEADS = [name for name in study_names() if isinstance(find_study(name), Study)]
GRID = {"target_size": [16], "steps": [5, 10], "keep_fraction": [0.125]}


def recipe(images: Path, **settings: object) -> Config:
    return small_config(images, grid=GRID, methods=["linear", "all_l21", "head2toe"], **settings)


@pytest.fixture(scope="module")
def run(images: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The small recipe with all studies of heads on its features."""
    run = RunDirectory(str(tmp_path_factory.mktemp("run")))
    run_stages(recipe(images, studies=ON_HEADS), run.uri, list(STAGES), Console(quiet=True))
    return run


def accuracies(run: RunDirectory, study: str) -> pd.Series:
    """Accuracy by task, variant and seed."""
    rows = frame(run, "studies/results").query("study == @study")
    return rows.set_index(["task", "variant", "seed"])["test_accuracy"].sort_index()


def of_the_run(run: RunDirectory, method: str) -> pd.Series:
    """Accuracy of a method of the run itself, by task and seed."""
    rows = frame(run, "results").query("method == @method")
    return rows.set_index(["task", "seed"])["test_accuracy"].sort_index()


def heads_in(run: RunDirectory, folder: str) -> list[Head]:
    """The heads of a folder."""
    return [load_head(run.read(name))[0] for name in run.names(folder)]


@pytest.mark.parametrize(
    ("study", "variant", "method"),
    [
        ("single-tap", "embedding alone", "linear"),
        ("taps-or-features", "head2toe 0.125", "head2toe"),
        ("relevance-offset", "offset 0", "head2toe"),  # an eighth of the features, as the grid has it
        ("scaling", "1 of the taps, T = 16", "head2toe"),
        ("data-fraction", "head2toe 1", "head2toe"),
        ("data-fraction", "linear 1", "linear"),
        ("normalisation", "head2toe", "head2toe"),
        ("selection-rules", "head2toe", "head2toe"),
    ],
)
def test_what_is_the_method_itself_has_the_results_of_the_run(
    run: RunDirectory, study: str, variant: str, method: str
) -> None:
    ours = accuracies(run, study).xs(variant, level="variant")
    pd.testing.assert_series_equal(ours, of_the_run(run, method))


def test_features_kept_on_the_task_itself_give_its_own_result(run: RunDirectory) -> None:
    ours, own = accuracies(run, "transfer-selection"), of_the_run(run, "head2toe")
    for task in ("first", "second"):
        pd.testing.assert_series_equal(ours[task][task], own[task])


def test_features_kept_on_another_task_are_that_tasks(run: RunDirectory) -> None:
    rows = frame(run, "studies/results").query("study == 'transfer-selection'")
    assert set(rows["variant"]) == set(rows["task"]) == {"first", "second"}
    heads = heads_in(run, "studies/heads/test_efficientnet/first/transfer-selection")
    assert len(heads) == 2  # one per seed; the task's own are those of the run
    others = heads_in(run, "heads/test_efficientnet/second/frozen")
    kept = {h.seed: h.kept for h in others if h.hyperparameters.method == "head2toe"}
    for head in heads:
        np.testing.assert_array_equal(head.kept, kept[head.seed])


def test_windows_of_relevance_cover_ranks_behind_the_offset(run: RunDirectory) -> None:
    heads = heads_in(run, "studies/heads/test_efficientnet/first/relevance-offset")
    by_offset = {h.hyperparameters.offset: h for h in heads if h.seed == 0}
    rows = frame(run, "studies/results").query("study == 'relevance-offset' and task == 'first'")
    n_kept = rows["n_kept"].iloc[0]
    assert set(by_offset) == set(rows["x"])
    kept = {offset: set(head.kept.tolist()) for offset, head in by_offset.items()}
    assert all(len(features) == n_kept for features in kept.values())
    assert not kept[n_kept] & kept[2 * n_kept]
    of_run = heads_in(run, "heads/test_efficientnet/first/frozen")
    (own,) = (h for h in of_run if h.hyperparameters.method == "head2toe" and h.seed == 0)
    np.testing.assert_array_equal(by_offset[0].weight, own.weight)


def test_a_single_tap_stands_beside_the_embedding(run: RunDirectory) -> None:
    rows = frame(run, "studies/results").query("study == 'single-tap' and task == 'first' and seed == 0")
    alone = rows.query("variant == 'embedding alone'")["n_kept"].item()
    pairs = rows.query("variant != 'embedding alone'")
    assert len(pairs) == pairs["variant"].nunique() > 5
    assert (pairs["n_kept"] == pairs["n_features"]).all()
    assert (pairs["n_kept"] > alone).all()
    assert (pairs["reference"] == "embedding alone").all()
    difference = pairs.groupby("variant")["difference"].first()
    means = accuracies(run, "single-tap")["first"].groupby("variant").mean()
    expected = means.drop("embedding alone") - means["embedding alone"]
    np.testing.assert_allclose(difference, expected, atol=1e-12)


def test_fewer_shots_are_fewer_images_of_every_class(run: RunDirectory) -> None:
    rows = frame(run, "studies/results").query("study == 'data-fraction' and task == 'first'")
    counts = rows.groupby("x")["n_train"].first().to_dict()
    assert counts == {0.1: 2, 0.25: 4, 0.5: 10, 0.75: 14, 1.0: 20}


def test_taps_are_kept_in_equal_number(run: RunDirectory) -> None:
    rows = frame(run, "studies/results").query("study == 'taps-or-features'")
    assert rows.groupby("task")["n_kept"].nunique().eq(1).all()
    assert set(rows["series"]) == {"head2toe", "head2toe_layerwise", "head2toe_layergroup"}


def test_running_again_does_nothing_and_a_study_less_takes_nothing_away(
    run: RunDirectory, images: Path, console: Console
) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(run.uri).rglob("*.*") if path.is_file()}
    run_stages(recipe(images, studies=ON_HEADS), run.uri, list(STAGES), console)
    assert output(console).count("nothing to do") == 4 + 3
    run_stages(recipe(images, studies=["scaling"]), run.uri, list(STAGES), console)
    run_stages(recipe(images), run.uri, list(STAGES), console)
    after = {path: path.stat().st_mtime_ns for path in Path(run.uri).rglob("*.*") if path.is_file()}
    assert after == before


RARELY = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("trials", "chosen", "predictions")]


@pytest.mark.parametrize("kind", ["heads", "results", *RARELY])
def test_a_deleted_file_of_a_study_is_made_again_and_nothing_else(
    run: RunDirectory, images: Path, kind: str
) -> None:
    before = frame(run, "studies/results")
    victim = next(name for name in run.names(f"studies/{kind}", recursive=True) if "/scaling/" in name)
    times = {path: path.stat().st_mtime_ns for path in Path(run.uri).rglob("*.*") if path.is_file()}
    (Path(run.uri) / victim).unlink()
    run_stages(recipe(images, studies=["scaling"]), run.uri, ["study"], Console(quiet=True))
    changed = [path for path, time in times.items() if path.stat().st_mtime_ns != time]
    parts = {path.relative_to(run.uri).parts[:2] for path in changed if "status" not in path.parts}
    assert parts <= {("studies", kind), ("tune", "study")}
    pd.testing.assert_frame_equal(frame(run, "studies/results"), before)


def test_a_study_says_what_it_costs_before_it_begins(
    run: RunDirectory, images: Path, console: Console
) -> None:
    run_stages(recipe(images, studies=["scaling"]), run.uri, ["study"], console)
    assert "scaling: 6 variants on 2 tasks" in output(console)
    assert "21 test images" in output(console)


def test_the_report_has_a_section_of_every_study(run: RunDirectory) -> None:
    report([run], run.subdirectory("report"), Console(quiet=True))
    page = run.read("report/index.html").decode()
    for name in ON_HEADS:
        assert f'<section id="{name}">' in page, name
        assert run.exists(f"report/{name}.md"), name
        rows = pd.read_parquet(io.BytesIO(run.read(f"report/{name}.parquet")))
        assert set(rows["task"]) == {"first", "second"}, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"studies": ["scalin"]}, "did you mean scaling"),
        ({"studies": ["overlap"]}, "overlap needs no training: it is a section of every report"),
        ({"studies": ["scaling", "scaling"]}, "expected every value once"),
        ({"studies": ["relevance-offset"], "methods": ["linear"]}, "relevance-offset builds on head2toe"),
        ({"studies": ["activations"], "methods": ["linear"]}, "activations builds on head2toe"),
        ({"studies": ["control"]}, "control needs a second network"),
        (
            {"backbone": {"second": {"name": "test_resnet"}, "weights": "auto"}, "methods": ["finetune"]},
            "backbone.second: finetune trains the backbone",
        ),
    ],
)
def test_studies_that_cannot_be_are_one_clear_error(images: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_config(images, **settings)


@pytest.mark.slow
def test_other_features_get_runs_of_their_own_that_the_report_compares(
    images: Path, cluster: Cluster, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path))
    second = {"name": "test_resnet", "weights": "random"}
    config = recipe(images, studies=["activations", "class-token", "single-tap", "control"], control=second)
    console = Console(file=io.StringIO(), width=120)
    run_stages(config, run.uri, list(STAGES), console)
    assert "class-token: test_efficientnet has nothing to compare" in output(console)
    runs = {name.split("/")[3] for name in run.names("studies/recipes", recursive=True)}
    others = {"with_input", "pre_normalization", "pre_activation"}
    assert runs == others | {"second"}
    report([run], run.subdirectory("report"), console)
    control = pd.read_parquet(io.BytesIO(run.read("report/single-tap-oracle.parquet")))["control"]
    assert control.notna().all()
    rows = pd.read_parquet(io.BytesIO(run.read("report/activations.parquet")))
    assert set(rows["variant"]) == others | {"original"}
    original = rows.query("variant == 'original'").set_index("task")["accuracy"]
    medians = of_the_run(run, "head2toe").groupby("task").median()
    pd.testing.assert_series_equal(original.sort_index(), medians, check_names=False)
