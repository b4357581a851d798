"""The files of a report: tables, figures (SVG, PNG), one page (HTML), and ``summary.json`` for programs.

Pure functions: the same frames give the same bytes.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from h2t.methods import METHODS
from pipelines.report.figures import inline_svg, page_specs, script
from pipelines.report.formats import data_files, latex, markdown, table_files, text_columns
from pipelines.report.frames import Frames
from pipelines.report.studies import Section, sections
from pipelines.report.tables import ReportTable, method_title, summaries, task_title

STATED = {"seeds": "seed"} | {
    name: name for name in ("weights", "image_source", "preprocessing", "fold_scheme")
}


def build_report(frames: Frames) -> dict[str, bytes]:
    """Every file of the report, name -> content."""
    shown = sections(frames)
    files: dict[str, bytes] = {}
    for section in shown:
        for table in section.tables:
            files |= table_files(table)
        for figure in section.figures:
            files |= {f"{figure.name}.svg": figure.svg.encode(), f"{figure.name}.png": figure.png}
            files |= data_files(f"{figure.name}-figure", figure.data)
    files["summary.json"] = json.dumps(summary(frames, shown), indent=1, sort_keys=True).encode()
    return files | {"index.html": render_page(frames, shown).encode()}


def summary(frames: Frames, shown: Sequence[Section]) -> dict[str, Any]:
    """What the page says, for programs: medians by backbone, method and task, and the words of sections."""
    accuracies: dict[str, Any] = {}
    for (backbone, method, task), found in sorted(summaries(frames.finished).items()):
        cell = {
            "median": found.median,
            "std": None if math.isnan(found.std) else found.std,
            "n_seeds": found.n,
        }
        accuracies.setdefault(backbone, {}).setdefault(method, {})[task] = cell
    return {
        "test_accuracy": accuracies,
        "sections": {section.name: {"title": section.title, "words": section.words} for section in shown},
        "recipe": str(frames.provenance.get("recipe", "")),
        "fingerprint": str(frames.provenance.get("fingerprint", "")),
    }


def render_page(frames: Frames, shown: Sequence[Section]) -> str:
    """The page: one HTML file with styles, figures and scripts inside, which needs no network.

    Without scripts it shows everything too: the figures are drawn in it already.
    """
    environment = Environment(
        loader=PackageLoader("pipelines.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "texts": text_columns,
        "plain": plain,
        "groups": header_groups,
        "inline": lambda figure: Markup(inline_svg(figure.name, figure.svg)),
    }
    return environment.get_template("report.html.j2").render(
        backbones=frames.backbones,
        sections=shown,
        figures=Markup(page_specs([figure for section in shown for figure in section.figures])),
        texts_of_tables=Markup(_texts(table for section in shown for table in section.tables)),
        vega=Markup(script()),
        highlights=[section.words for section in shown if section.on_top == "highlight"],
        warnings=[
            *_warnings(frames),
            *(section.words for section in shown if section.on_top == "warning"),
        ],
        provenance=_stated(frames.results) | dict(frames.provenance),
    )


def _texts(tables: Iterable[ReportTable]) -> str:
    """The tables by name as Markdown and LaTeX, as JSON for a script of the page."""
    texts = {table.name: {"md": markdown(table), "tex": latex(table)} for table in tables}
    return json.dumps(texts).replace("<", "\\u003c")  # a cell could end the script


def plain(value: Any) -> list[str]:
    """A provenance value as lines of text, without what is empty."""
    if isinstance(value, Mapping):
        return [
            f"{key}: {', '.join(plain(inner))}" for key, inner in value.items() if inner not in ("", None)
        ]
    if isinstance(value, list | tuple):
        return [", ".join(line for inner in value for line in plain(inner))]
    return [str(value)]


def header_groups(headers: pd.MultiIndex) -> list[tuple[str, int]]:
    """The upper level of headers as runs: (group, how many columns it spans)."""
    return [(group, len(list(members))) for group, members in groupby(headers.get_level_values(0))]


def _warnings(frames: Frames) -> Iterator[str]:
    if frames.finished.empty:
        yield "No training has ended well: there are no accuracies."
    if frames.missing:
        n_tasks = len({task for task, _ in frames.asked})
        places = {
            method: "every task" if len(tasks) == n_tasks else ", ".join(map(task_title, tasks))
            for method, tasks in frames.missing.items()
        }
        parts = [f"{method_title(method)} on {place}" for method, place in places.items()]
        yield f"Not everything has been run. Missing: {'; '.join(parts)}."
    from_scratch = [name for name, method in METHODS.items() if not method.pretrained]
    pretrained = frames.results[~frames.results["method"].isin(from_scratch)]
    if pretrained["weights"].astype(str).str.startswith("random").any():
        yield "The backbone has random weights: these results say nothing about transfer learning."
    if any("lossy" in line for value in frames.provenance.values() for line in plain(value)):
        yield (
            "Some images were stored as lossy JPEG, unlike the originals that the paper used: "
            "not comparable with published figures."
        )


def _stated(results: pd.DataFrame) -> dict[str, str]:
    """What the result rows themselves say of where they come from."""
    values = {name: sorted(map(str, results[column].dropna().unique())) for name, column in STATED.items()}
    return {name: ", ".join(texts) for name, texts in values.items() if texts}
