"""Images that were left out, and trainings that failed."""

import pandas as pd

from pipelines.report.frames import DONE, Frames
from pipelines.report.studies import Section
from pipelines.report.tables import MISSING, ReportTable


def section(frames: Frames) -> Section | None:
    """A table per kind of problem; None where all is well."""
    candidates = [
        problem_table("bad_rows", "Images left out", frames.bad_rows),
        problem_table("failed_trials", "Trials that failed", _failed(frames.trials)),
        problem_table("failed_results", "Trainings that failed", _failed(frames.results)),
    ]
    tables = tuple(table for table in candidates if len(table.data))
    words = " ".join(f"{table.title}: {len(table.data)}." for table in tables)
    return (
        Section("problems", "Problems", 90, words, tables, folded=True, on_top="warning") if words else None
    )


def _failed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["status"] != DONE]


def problem_table(name: str, title: str, rows: pd.DataFrame, limit: int = 50) -> ReportTable:
    """Rows that were skipped or failed, the first ``limit`` of them on display."""
    rows = rows.sort_values(rows.columns.tolist(), ignore_index=True)
    shown = rows.head(limit).astype(object)
    display = shown.where(shown.notna(), MISSING).astype(str)
    note = f"{len(rows)} in all" + (f", the first {limit} shown." if len(rows) > limit else ".")
    return ReportTable(name, title, note, rows, display)
