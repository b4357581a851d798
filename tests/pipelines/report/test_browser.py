"""The page in a real browser, where there is one: Chromium without a window, driven by Playwright."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.report.page import build_report
from tests.pipelines.report.conftest import frames_of, result_frame, study_frame, thumbnail_frame
from tests.pipelines.report.studies.test_significance import RIGHT, predictions

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
DRAWN = (
    "document.querySelectorAll('[data-figure]').length === document.querySelectorAll('[data-drawn]').length"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section that a run of two tasks gives."""
    results = result_frame(tasks=("mnist", "solar_cells"), methods=tuple(RIGHT))
    folder = tmp_path_factory.mktemp("report")
    frames = frames_of(
        results, predictions=predictions(), study_results=study_frame(), thumbnails=thumbnail_frame()
    )
    for name, content in build_report(frames).items():
        (folder / name).write_bytes(content)
    return folder / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page, drawn; at its end nothing may have complained, and nothing left the machine."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function(DRAWN)
    yield page
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]


def test_everything_is_drawn(page: Any, file: Path) -> None:
    drawn = page.locator("[data-drawn]")
    assert drawn.count() == file.read_text().count("data-figure=") > 12
    for number in range(drawn.count()):
        assert drawn.nth(number).locator("svg path").count() > 1
    assert "More than chance?" in page.content()


def test_without_scripts_everything_is_there_too(browser: Any, file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    places = page.locator("[data-figure]")
    assert places.count() == page.locator("[data-figure] > svg").count() > 12
    assert page.locator("button").count() == 0
    context.close()


def test_pointing_at_a_bar_tells_its_value(page: Any) -> None:
    page.locator("[data-figure=gain] path[aria-roledescription=bar]").first.hover()
    tooltip = page.locator("#vg-tooltip-element")
    tooltip.get_by_text("MNIST").wait_for()
    assert "Gain" in tooltip.inner_text()


@pytest.mark.parametrize("name", ["methods", "data-fraction-mean", "taps-or-features"])
def test_a_click_in_the_legend_leaves_one_method(page: Any, name: str) -> None:
    figure = page.locator(f"[data-figure={name}]")
    others = figure.locator("[opacity='0.1'], [opacity='0.15']")
    assert others.count() == 0
    figure.locator(".role-legend-symbol path").first.click()
    others.first.wait_for(state="attached")


def column(page: Any, table: str, number: int) -> list[str]:
    cells = page.locator(f"[data-table='{table}'] tbody tr > :nth-child({number})")
    return [text.strip() for text in cells.all_inner_texts()]


def test_columns_sort_in_both_directions(page: Any) -> None:
    before = column(page, "table1", 2)
    header = page.locator("[data-table=table1] thead tr:last-child th").nth(1)
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    values = [float(text.removesuffix(" ≈")) for text in column(page, "table1", 2)]
    assert values == sorted(values, reverse=True)
    header.locator("button").click()
    assert [float(text.removesuffix(" ≈")) for text in column(page, "table1", 2)] == sorted(values)
    assert sorted(before) == sorted(column(page, "table1", 2))


def test_rows_and_columns_can_be_left_out(page: Any) -> None:
    section = page.locator("#table1")
    section.get_by_text("Choose rows").first.click()
    section.get_by_label("Linear", exact=True).first.uncheck()
    assert not page.locator("[data-table=table1] tbody tr").first.is_visible()
    section.get_by_text("Choose columns").first.click()
    section.get_by_label("MNIST").first.uncheck()
    assert not page.locator("[data-table=table1] thead tr:last-child th").nth(1).is_visible()


def test_another_metric_can_be_chosen(page: Any) -> None:
    section = page.locator("#table1")
    assert page.locator("[data-table=table1]").is_visible()
    section.get_by_label("Metric").select_option("Log loss (nats)")
    assert not page.locator("[data-table=table1]").is_visible()
    assert page.locator("[data-table=table1-log-loss]").is_visible()


@pytest.mark.parametrize(
    ("title", "part"), [("Copy as Markdown", "| Method"), ("Copy as LaTeX", "\\toprule")]
)
def test_tables_are_copied(page: Any, title: str, part: str) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#table1").get_by_text(title).first.click()
    page.get_by_text("Copied").first.wait_for()
    assert part in page.evaluate("navigator.clipboard.readText()")


def test_the_first_column_stays_when_a_wide_table_scrolls(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    table = page.locator("[data-table=table1]")
    table.evaluate("element => { element.scrollLeft = 200; }")
    left = table.evaluate("element => element.getBoundingClientRect().left")
    cell = table.locator("tbody th").first
    assert abs(cell.evaluate("element => element.getBoundingClientRect().left") - left) < 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_legible_on_a_desk_and_on_a_phone(page: Any, file: Path, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 1600})
    shot = file.parent / f"{width}-{scheme}.png"
    page.screenshot(path=shot)
    pixels = np.asarray(Image.open(shot).convert("L"), int)
    paper = pixels[4, 4]
    assert (paper < 60) == (scheme == "dark")
    drawn = (abs(pixels - paper) > 90).mean(0)  # columns with ink, none cut off at the right
    assert drawn[: width // 2].max() > 0.01
    assert drawn[-2:].max() < 0.9


def test_the_page_prints(page: Any, file: Path) -> None:
    printed = page.pdf()
    assert printed.startswith(b"%PDF")
    assert len(printed) > 20_000
