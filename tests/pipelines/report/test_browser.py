"""The page in a real browser, where there is one: Chromium without a window or a network."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.report.page import build_report
from tests.pipelines.report.conftest import frames_of, result_frame
from tests.pipelines.report.studies.test_significance import RIGHT, predictions

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section that a run of two tasks gives."""
    results = result_frame(tasks=("mnist", "solar_cells"), methods=tuple(RIGHT))
    folder = tmp_path_factory.mktemp("report")
    for name, content in build_report(frames_of(results, predictions=predictions())).items():
        (folder / name).write_bytes(content)
    return folder / "index.html"


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    profile = f"--user-data-dir={page.parent / 'profile'}"
    nothing_outside = "--host-resolver-rules=MAP * ~NOTFOUND"
    return subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", profile,
         nothing_outside, *options, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def test_everything_is_drawn_and_nothing_complains(page: Path) -> None:
    done = browse(page, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == page.read_text().count("<svg") > 2
    assert "More than chance?" in done.stdout


@pytest.mark.parametrize(("width", "height"), [(1200, 1600), (400, 1600)])
def test_the_page_is_legible_on_a_desk_and_on_a_phone(page: Path, width: int, height: int) -> None:
    shot = page.parent / f"{width}.png"
    browse(page, f"--screenshot={shot}", f"--window-size={width},{height}")
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (height, width)
    drawn = (pixels < 128).mean(0)  # columns with ink: from the left margin on, but none cut off at the right
    assert drawn[: width // 2].max() > 0.01
    assert drawn[-2:].max() < 0.9


def test_the_page_prints(page: Path) -> None:
    printed = page.parent / "page.pdf"
    browse(page, f"--print-to-pdf={printed}", "--no-pdf-header-footer")
    assert printed.read_bytes().startswith(b"%PDF")
    assert printed.stat().st_size > 20_000
