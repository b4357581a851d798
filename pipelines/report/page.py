"""Stage 5: the results as tables (Parquet, CSV, Markdown, LaTeX), figures (SVG, PNG) and one page (HTML).

Everything but ``write_report`` is a pure function: the same frames give the same bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from h2t.costs import BackboneCost
from pipelines.report import figures
from pipelines.report.comparisons import affinity_table, cost_table, gain_table, gains, paper_table
from pipelines.report.formats import table_files, text_columns
from pipelines.report.tables import (
    DONE,
    ReportTable,
    accuracy_table,
    backbones_in_order,
    deviation_table,
    finished,
    hyperparameter_table,
    kept_table,
    methods_in_order,
    of_selecting_methods,
    problem_table,
    signed,
    task_title,
    tasks_in_order,
)
from pipelines.run_directory import RunDirectory

TEXT_COLUMNS = ("backbone", "task", "group", "method")
NUMBER_COLUMNS = ("seed", "test_accuracy", "n_test", "n_correct", "n_classes", "steps")
STATED_COLUMNS = ("weights", "image_source", "preprocessing", "fold_scheme")


@dataclass(frozen=True)
class ReportFigure:
    """A figure, its caption, and what it shows in words for those who cannot see it."""

    name: str
    caption: str
    description: str
    svg: str
    png: bytes


def write_report(
    run: RunDirectory,
    results: pd.DataFrame,
    selected: pd.DataFrame,
    kept: pd.DataFrame,
    bad_rows: pd.DataFrame | None,
    provenance: Mapping[str, Any],
    *,
    trials: pd.DataFrame | None = None,
    costs: Mapping[str, BackboneCost] | None = None,
) -> list[str]:
    """Write the files of ``build_report`` under ``report/`` of the run directory; their names.

    What else is there, of an earlier report, is set aside.
    """
    built = build_report(results, selected, kept, bad_rows, provenance, trials=trials, costs=costs)
    files = {f"report/{name}": content for name, content in built.items()}
    run.reconcile("report", files)
    for name, content in files.items():
        run.write(name, content)
    return list(files)


def build_report(
    results: pd.DataFrame,
    selected: pd.DataFrame,
    kept: pd.DataFrame,
    bad_rows: pd.DataFrame | None,
    provenance: Mapping[str, Any],
    *,
    trials: pd.DataFrame | None = None,
    costs: Mapping[str, BackboneCost] | None = None,
) -> dict[str, bytes]:
    """Every file of the report, name -> content.

    The frames are those of the run directory; each may be empty, and tasks, methods and seeds may be missing.
    ``provenance`` (plain values, nested as you like) stands at the foot of the page. ``costs``, backbone ->
    what was measured of it, is needed for modelled costs.
    """
    if results.empty:
        results = _no_results()
    kept = of_selecting_methods(kept)
    tables = list(_tables(results, selected, kept, costs or {}))
    problems = list(_problems(results, bad_rows, trials))
    drawn = list(_figures(results, kept))
    files = {name: content for table in [*tables, *problems] for name, content in table_files(table).items()}
    for figure in drawn:
        files |= {f"{figure.name}.svg": figure.svg.encode(), f"{figure.name}.png": figure.png}
    return files | {"index.html": render_page(results, tables, problems, drawn, provenance).encode()}


def render_page(
    results: pd.DataFrame,
    tables: list[ReportTable],
    problems: list[ReportTable],
    drawn: list[ReportFigure],
    provenance: Mapping[str, Any],
) -> str:
    """The page: one HTML file with styles and figures inside, which needs no network."""
    environment = Environment(
        loader=PackageLoader("pipelines.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"texts": text_columns, "plain": plain, "groups": header_groups}
    by_name = {table.name: table for table in tables}
    return environment.get_template("report.html.j2").render(
        backbones=backbones_in_order(results),
        highlights=list(highlights(results)),
        warnings=list(_warnings(results, problems, provenance)),
        tables=by_name,
        figures=[(figure, Markup(figures.inline_svg(figure.name, figure.svg))) for figure in drawn],
        problems=problems,
        provenance=_stated(results) | dict(provenance),
    )


def highlights(results: pd.DataFrame) -> Iterator[str]:
    """The findings in a sentence each, per backbone."""
    for backbone in backbones_in_order(finished(results)):
        rows = gains(results, backbone)
        if rows.empty:
            continue
        won, tasks = int((rows["gain"] > 0).sum()), f"{len(rows)} task{'s' if len(rows) > 1 else ''}"
        best = rows.to_dict("records")[int(rows["gain"].argmax())]
        yield (
            f"{backbone}: Head2Toe beats the linear probe on {won} of {tasks}; its mean gain is "
            f"{signed(rows['gain'].mean())} points, its largest {signed(best['gain'])} on "
            f"{task_title(best['task'])}."
        )


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


def _no_results() -> pd.DataFrame:
    columns = {name: pd.Series(dtype="str") for name in TEXT_COLUMNS}
    return pd.DataFrame(columns | {name: pd.Series(dtype="float64") for name in NUMBER_COLUMNS})


def _tables(
    results: pd.DataFrame, selected: pd.DataFrame, kept: pd.DataFrame, costs: Mapping[str, BackboneCost]
) -> Iterator[ReportTable]:
    known = not finished(results).empty
    if known:
        beside = [affinity_table(results), paper_table(results)]
        yield from (accuracy_table(results), gain_table(results), deviation_table(results))
        yield from (table for table in beside if table is not None)
    if not selected.empty:
        yield hyperparameter_table(selected)
    if not kept.empty:
        yield kept_table(kept)
    if known:
        yield cost_table(results, costs)


def _figures(results: pd.DataFrame, kept: pd.DataFrame) -> Iterator[ReportFigure]:
    backbones = backbones_in_order(pd.concat([results[["backbone"]], kept.reindex(columns=["backbone"])]))
    for backbone in backbones:
        suffix = "" if len(backbones) == 1 else f"-{backbone}"
        yield from _result_figures(results, backbone, suffix)
        if not kept.empty and backbone in set(kept["backbone"]):
            yield from _kept_figures(kept[kept["backbone"] == backbone], backbone, suffix)


def _result_figures(results: pd.DataFrame, backbone: str, suffix: str) -> Iterator[ReportFigure]:
    rows = gains(results, backbone)
    if rows.empty:
        return
    values = "; ".join(f"{task_title(row['task'])} {signed(row['gain'])}" for row in rows.to_dict("records"))
    caption = f"Gain of Head2Toe over the linear probe, {backbone}."
    yield _drawn(f"gain{suffix}", caption, f"In points of percent: {values}.", figures.gain_figure(rows))
    table = affinity_table(results[results["backbone"] == backbone])
    if table is not None and table.data["gain"].notna().any():
        points = table.data.dropna(subset="gain").assign(
            group=lambda data: data["task"].map(tasks_in_order(results))
        )
        caption = f"Gain of Head2Toe against domain affinity, {backbone}. Far tasks are on the left."
        description = "The numbers are in the table of domain affinity."
        yield _drawn(f"affinity{suffix}", caption, description, figures.affinity_figure(points))


def _kept_figures(kept: pd.DataFrame, backbone: str, suffix: str) -> Iterator[ReportFigure]:
    shares = kept_table(kept).data
    for method in methods_in_order(shares):
        rows = shares[shares["method"] == method]
        if rows["share"].notna().any():
            name = "kept_features" if method == "head2toe" else f"kept_features-{method}"
            caption = (
                f"Where the kept features come from, {backbone}: each row is a task and adds up to 100 %."
            )
            description = "The numbers are in the table of features kept per tap."
            yield _drawn(f"{name}{suffix}", caption, description, figures.kept_figure(rows))


def _drawn(name: str, caption: str, description: str, figure: Figure) -> ReportFigure:
    return ReportFigure(name, caption, description, figures.svg_text(figure), figures.png_bytes(figure))


def _problems(
    results: pd.DataFrame, bad_rows: pd.DataFrame | None, trials: pd.DataFrame | None
) -> Iterator[ReportTable]:
    if bad_rows is not None and len(bad_rows):
        yield problem_table("bad_rows", "Images left out", bad_rows)
    for name, title, rows in [
        ("failed_trials", "Trials that failed", trials),
        ("failed_results", "Trainings that failed", results),
    ]:
        if rows is not None and "status" in rows:
            failed = rows[rows["status"].fillna(DONE) != DONE]
            if len(failed):
                yield problem_table(name, title, failed)


def _warnings(
    results: pd.DataFrame, problems: list[ReportTable], provenance: Mapping[str, Any]
) -> Iterator[str]:
    if results.empty:
        yield "There are no results yet."
    if _untrained(results):
        yield "The backbone has random weights: these results say nothing about transfer learning."
    if any("lossy" in line for value in provenance.values() for line in plain(value)):
        yield (
            "Some images were stored as lossy JPEG, unlike the originals that the paper used: "
            "not comparable with published figures."
        )
    for table in problems:
        yield f"{table.title}: {len(table.data)}."


def _untrained(results: pd.DataFrame) -> bool:
    """Whether a method that should start from pretrained weights had random ones."""
    if "weights" not in results:
        return False
    pretrained = results[results["method"] != "scratch"]
    return bool(pretrained["weights"].astype(str).str.startswith("random").any())


def _stated(results: pd.DataFrame) -> dict[str, str]:
    """What the result rows themselves say of where they come from."""
    named = {"seeds": "seed"} | {name.replace("_", " "): name for name in STATED_COLUMNS}
    found = {name: results[column].dropna().unique() for name, column in named.items() if column in results}
    return {name: ", ".join(sorted(map(str, values))) for name, values in found.items() if len(values)}
