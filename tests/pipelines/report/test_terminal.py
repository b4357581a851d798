import io
import re
from collections.abc import Sequence

import pandas as pd
import pytest
from rich.console import Console

from h2t.methods import METHODS
from pipelines.report.terminal import print_table
from tests.pipelines.report.conftest import FROZEN, PUBLISHED, result_frame, vtab


def printed(results: pd.DataFrame, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_table(results, console)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("methods", [FROZEN, PUBLISHED])
def test_table_fits(width: int, methods: Sequence[str]) -> None:
    text = printed(vtab(methods=methods), width)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert len(re.findall(r"^ CIFAR-100( +\d+\.\d( ± \d\.\d)?)+ *$", text, flags=re.MULTILINE)) == 1
    last = next(line for line in text.splitlines() if "mean, all" in line)
    assert len(re.findall(r"\d+\.\d", last)) == len(methods)


def test_table_has_a_column_for_every_method() -> None:
    assert "mean, all" in printed(result_frame(methods=list(METHODS)), width=200)


@pytest.mark.parametrize(
    ("n_linear", "n_scratch", "title"),
    [(1, 1, "one seed"), (3, 3, "median of 3 seeds"), (3, 1, "median of 1 to 3 seeds")],
)
def test_title_says_how_many_seeds(n_linear: int, n_scratch: int, title: str) -> None:
    counts = {"linear": n_linear, "scratch": n_scratch}
    rows = result_frame(methods=list(counts))
    text = printed(rows[rows["seed"] < rows["method"].map(counts)])
    assert f"efficientnet_lite0, {title} " in " ".join(text.split())


def test_without_results() -> None:
    assert printed(result_frame()[:0]).strip() == "No results yet."
