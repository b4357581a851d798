"""The page and the files beside it."""

import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from pipelines.report.figures import INK, figure_name, inline_svg
from pipelines.report.frames import Frames
from pipelines.report.page import build_report
from pipelines.report.studies import sections
from tests.pipelines.report.conftest import PUBLISHED, bad_row, frames_of, kept_frame, result_frame


@pytest.fixture(scope="module")
def files(results: pd.DataFrame) -> dict[str, bytes]:
    return build_report(frames_of(results))


def page_of(frames: Frames) -> str:
    return build_report(frames)["index.html"].decode()


class Page(HTMLParser):
    """Collects ids, links and what a page loads, and checks that its tags nest."""

    VOID = ("meta", "br", "link", "img", "use", "path", "input")
    CDATA_CONTENT_ELEMENTS = ("script", "style")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: str(value) for name, value in attributes}
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.loaded += [values[name] for name in ("src", "data", "poster") if name in values]
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if self.open and tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_files_of_a_report(files: dict[str, bytes]) -> None:
    names = {"table1", "table2", "table4", "gain", "kept_features", "costs"}
    tables = {f"{name}.{ending}" for name in names for ending in ("parquet", "csv", "md", "tex")}
    endings = (".svg", ".png", "-figure.csv", "-figure.parquet")
    drawn = {f"{name}{ending}" for name in ("gain", "kept_features") for ending in endings}
    assert tables | drawn | {"index.html"} <= set(files)
    for name in names:
        parquet = pd.read_parquet(io.BytesIO(files[f"{name}.parquet"]))
        csv = pd.read_csv(io.BytesIO(files[f"{name}.csv"]))
        pd.testing.assert_frame_equal(parquet, csv, check_dtype=False)
    assert files["gain.png"].startswith(b"\x89PNG")
    for name in ("gain.svg", "kept_features.svg"):
        assert ElementTree.fromstring(files[name]).tag.endswith("svg")


def test_page_is_complete_and_needs_no_network(files: dict[str, bytes]) -> None:
    text = files["index.html"].decode()
    page = Page(text)
    assert page.open == []
    assert page.loaded == []
    assert "link" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    inside = {link[1:] for link in page.links if link.startswith("#")}
    assert inside <= set(page.ids)
    assert {link for link in page.links if not link.startswith("#")} == set(files) - {"index.html"}
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.findall(r"(?:@import|url\()\s*['\"]?https?:", style)
    assert text.count("</script>") == 4  # no title or cell ends one early


def test_page_says_where_everything_comes_from_and_escapes_it(files: dict[str, bytes]) -> None:
    text = files["index.html"].decode()
    for part in ("CC-BY-NC-SA-4.0", "128 px, bilinear", "blocks", "learning_rate: 0.1, 0.01"):
        assert part in text
    assert "licence: <" not in text
    assert "&lt;script&gt;" in text


def test_every_section_says_what_it_shows(results: pd.DataFrame) -> None:
    failed = results.assign(status="failed", test_accuracy=np.nan)
    other = result_frame("resnet50", ["cifar100", "kitti"], PUBLISHED, n_test=None)
    for section in sections(frames_of(pd.concat([results, other, failed]))):
        assert re.fullmatch(r"[^–]+\.", section.words), section.name


def test_two_backbones_stand_side_by_side(results: pd.DataFrame) -> None:
    other = result_frame("resnet50", ["cifar100", "kitti", "clevr_dist"], PUBLISHED, (0, 1), n_test=None)
    rows = pd.concat([results, other])
    files = build_report(frames_of(rows, kept=kept_frame(rows, n_taps=6)))
    assert {"gain-resnet50.svg", "gain-efficientnet_lite0.svg", "affinity-resnet50.svg"} <= set(files)
    assert Page(files["index.html"].decode()).open == []


def test_random_weights_lossy_images_and_problems_are_pointed_out(results: pd.DataFrame) -> None:
    trials = pd.DataFrame({"task": ["mnist"] * 2, "status": ["done", "failed"]})
    source = {"images": {"mnist": {"encoding": "lossy JPEG copy"}}}
    text = page_of(
        Frames(results.assign(weights="random"), trials=trials, bad_rows=bad_row(), provenance=source)
    )
    for warning in ("random weights", "lossy JPEG", "Images left out: 1.", "Trials that failed: 1."):
        assert warning in text


def test_random_weights_of_a_training_from_scratch_are_no_fault() -> None:
    rows = result_frame(methods=["linear", "scratch"], seeds=(0,))
    rows.loc[rows["method"] == "scratch", "weights"] = "random, seed 0"
    assert "random weights" not in page_of(Frames(rows))


def test_results_that_all_failed_are_reported_as_such(results: pd.DataFrame) -> None:
    files = build_report(Frames(results.assign(status="failed", test_accuracy=np.nan)))
    text = files["index.html"].decode()
    assert "there are no accuracies" in text
    assert f"Trainings that failed: {len(results)}." in text
    assert "table1.md" not in files


def test_inline_figures_take_the_pages_ink_and_ids_of_theirs(files: dict[str, bytes]) -> None:
    text = inline_svg("gain", files["gain.svg"].decode())
    assert "currentColor" in text
    assert INK not in text
    ids = set(re.findall(r'id="([^"]+)"', text))
    assert all(name.startswith("gain-") for name in ids)
    assert set(re.findall(r'(?:url\(|xlink:href=")#([^")]+)', text)) <= ids


def test_figures_have_names_that_a_link_can_hold() -> None:
    assert figure_name("gain", "a", ["a"]) == "gain"
    assert figure_name("gain", "vit_b.16 (my run/2)", ["a", "b"]) == "gain-vit_b.16-my-run-2"


def test_a_run_that_is_not_done_says_what_is_missing(results: pd.DataFrame) -> None:
    some = results[~((results["method"] == "head2toe") & (results["task"] == "mnist"))]
    asked = frozenset(
        (task, method) for task in results["task"] for method in (*results["method"], "finetune")
    )
    text = page_of(frames_of(some, asked=asked))
    assert "Not everything has been run. Missing: Fine-tuning on every task; Head2Toe on MNIST." in text
    assert "Not everything" not in page_of(frames_of(results))
