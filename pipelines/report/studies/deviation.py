"""Table 4: sample standard deviation of the test accuracy over seeds."""

import pandas as pd

from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import (
    ReportTable,
    percent,
    statistics,
    summaries,
    tasks_in_order,
    with_headers,
)


def section(frames: Frames) -> Section | None:
    """The table, and the largest deviation in it; None without results."""
    if frames.finished.empty:
        return None
    table = deviation_table(frames.finished)
    largest = max(
        (summary.std for summary in summaries(frames.finished).values() if summary.n > 1), default=0
    )
    words = f"Over seeds, accuracies deviate by {percent(largest, 2)} points at most." if largest else ""
    return Section(table.name, table.title, 30, words, (table,))


def deviation_table(results: pd.DataFrame) -> ReportTable:
    """Sample standard deviations, which a single seed has not."""
    data = statistics(results, "std")
    shown = data.drop(columns=["backbone", "method"]).map(lambda value: percent(value, 2))
    single = {key for key, summary in summaries(results).items() if summary.n == 1}
    for row, (backbone, method) in enumerate(zip(data["backbone"], data["method"], strict=True)):
        for column, task in enumerate(shown):
            if (backbone, method, task) in single:
                shown.iat[row, column] = "1 seed"
    return ReportTable(
        "table4",
        "Standard deviation over seeds",
        "Sample standard deviation of the test accuracy, in points of percent; a single seed has none.",
        data,
        with_headers(data, shown, tasks_in_order(results)),
    )
