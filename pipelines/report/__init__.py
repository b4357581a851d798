"""The report: tables, figures and one page from the files of finished runs, without Ray, images or recipe."""

import re
from collections.abc import Sequence

from rich.console import Console

from h2t.errors import UserError
from pipelines.report.frames import read_runs
from pipelines.report.page import build_report
from pipelines.report.terminal import print_table
from pipelines.run_directory import RunDirectory

__all__ = ["report"]


def report(runs: Sequence[RunDirectory], destination: RunDirectory, console: Console) -> list[str]:
    """Write the report of one or several runs to a folder and print its main table; the names of the files.

    Files of an earlier report there that this one lacks are deleted; other files stay.

    Raises:
        UserError: no results, a run directory of another layout, or a file that cannot be read.
    """
    frames = read_runs(runs)
    if frames.results.empty:
        uris = ", ".join(run.uri for run in runs)
        raise UserError(f"no results in {uris}: run the evaluate stage first")
    files = build_report(frames)
    for name in _files_of_report(destination):
        if name not in files and destination.exists(name):
            destination.delete(name)
    for name, content in files.items():  # the page last: it is whole when it appears
        destination.write(name, content)
    print_table(frames.finished, console)
    console.print(f"{'report':<9} {len(files)} files; open {destination.subdirectory('index.html').uri}")
    return list(files)


def _files_of_report(destination: RunDirectory) -> list[str]:
    """The files that the page of an earlier report links to."""
    page = destination.read("index.html").decode() if destination.exists("index.html") else ""
    if "<title>Head2Toe: results" not in page:
        return []
    return re.findall(r'href="([\w.-]+\.(?:csv|json|parquet|md|tex|svg|png))"', page)
