"""Table 1: median test accuracy over seeds, of every method on every task."""

import pandas as pd

from h2t.methods import PAPERS
from pipelines.report.frames import Frames
from pipelines.report.paired import Correctness, not_worse_than_best
from pipelines.report.studies import Section
from pipelines.report.tables import (
    ReportTable,
    method_title,
    number,
    percent,
    statistics,
    summaries,
    tasks_in_order,
    with_headers,
)

CLOSE = "≈"
NEW = "†"  # behind a method that is not the paper's
MEASURES = {
    "balanced_accuracy": ("Balanced accuracy", False, True),
    "macro_f1": ("Macro-F1", False, True),
    "log_loss": ("Log loss (nats)", True, False),
    "brier": ("Brier score", True, False),
    "calibration_error": ("Calibration error", True, True),
}
"""Measures beside accuracy: title, whether the lowest is best, whether they are shown in percent."""


def section(frames: Frames) -> Section | None:
    """The table, and which method is best on average; None without results."""
    if frames.finished.empty:
        return None
    table = accuracy_table(frames.finished, frames.correctness)
    means = table.data.dropna(subset="mean_all").sort_values("mean_all", kind="stable")
    best = means.groupby("backbone").tail(1).sort_values("backbone").to_dict("records")
    words = " ".join(
        f"{row['backbone']}: {method_title(row['method'])} has the highest mean over all tasks, "
        f"{percent(row['mean_all'])} %."
        for row in best
    )
    others = tuple(measure_table(frames.finished, measure) for measure in MEASURES)
    shown = (table, *(other for other in others if other is not None))
    return Section(table.name, table.title, 10, words, shown, choose="Metric" if len(shown) > 1 else "")


def measure_table(results: pd.DataFrame, measure: str) -> ReportTable | None:
    """Medians over seeds of another measure than accuracy, the best of each column in bold."""
    if results[measure].isna().all():
        return None
    title, lower, in_percent = MEASURES[measure]
    data = _papers_first(statistics(results, "median", measure))
    values = data.drop(columns=["backbone", "method"])
    shown = values.map(percent if in_percent else lambda value: number(value, digits=3))
    return ReportTable(
        f"table1-{measure.replace('_', '-')}",
        title,
        f"Median over seeds{', in percent' if in_percent else ''}; the best of each column, the "
        f"{'lowest' if lower else 'highest'}, in bold.{_about_new(data)}",
        data,
        _displayed(data, shown, results),
        _best_as_shown(data["backbone"], shown, lower),
    )


def accuracy_table(results: pd.DataFrame, found: Correctness | None = None) -> ReportTable:
    """Medians over seeds, the best of each column in bold and what it does not clearly beat marked."""
    data = _papers_first(statistics(results, "median"))
    shown = data.drop(columns=["backbone", "method"]).map(percent)
    bold = _best_as_shown(data["backbone"], shown)
    if found is not None:
        _mark_close(data, shown, found, results)
    return ReportTable(
        "table1",
        "Test accuracy",
        "Median over seeds, in percent; the best of each column in bold. A mean is shown where the method "
        "has a result for every task of the backbone. The mean over all tasks weighs every task alike."
        + (f" {CLOSE}: not beaten by the best by more than chance (95 %)." if found is not None else "")
        + _about_new(data),
        data,
        _displayed(data, shown, results),
        bold,
    )


def _papers_first(data: pd.DataFrame) -> pd.DataFrame:
    """The same rows, those of methods that are not the paper's last of their backbone."""
    order = data.assign(new=~data["method"].isin(PAPERS)).sort_values(["backbone", "new"], kind="stable")
    return order.drop(columns="new").reset_index(drop=True)


def _displayed(data: pd.DataFrame, shown: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Finished cells under their headers, with a mark behind methods that are not the paper's."""
    display = with_headers(data, shown, tasks_in_order(results))
    display[("", "Method")] += data["method"].map(lambda method: "" if method in PAPERS else f" {NEW}")
    return display


def _about_new(data: pd.DataFrame) -> str:
    """What the mark says, where it is there."""
    return "" if data["method"].isin(PAPERS).all() else f" {NEW}: not a method of the paper; these come last."


def _mark_close(data: pd.DataFrame, shown: pd.DataFrame, found: Correctness, results: pd.DataFrame) -> None:
    """Put a mark behind the cells that the best of their column does not beat by more than chance."""
    medians = {key: summary.median for key, summary in summaries(results).items()}
    close = not_worse_than_best(found, medians)
    for row, (backbone, method) in enumerate(zip(data["backbone"], data["method"], strict=True)):
        for column, task in enumerate(shown):
            if (backbone, method, task) in close:
                shown.iat[row, column] = f"{shown.iat[row, column]!s} {CLOSE}"


def _best_as_shown(
    backbones: pd.Series, shown: pd.DataFrame, lower: bool = False
) -> frozenset[tuple[int, int]]:
    """Cells on display that equal the best of their backbone's column, digits that are not shown aside."""
    first = 2 if backbones.nunique() > 1 else 1  # after the columns of backbone and method
    best = set()
    for column, name in enumerate(shown):
        numbers = pd.to_numeric(shown[name], errors="coerce")
        top = numbers.groupby(backbones).transform("min" if lower else "max")
        best |= {(row, column + first) for row, is_top in enumerate(numbers == top) if is_top}
    return frozenset(best)
