"""Figures 2, 3 and 11 (left): Head2Toe against linear and fine-tuning, tasks by domain affinity."""

import math

import altair as alt
import pandas as pd

from h2t import metrics
from pipelines.report.figures import (
    WIDTH,
    ReportFigure,
    dots,
    draw,
    figure_name,
    group_colours,
    method_colours,
)
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.studies.costs import cost_table
from pipelines.report.tables import (
    ReportTable,
    backbones_in_order,
    by_backbone,
    medians,
    method_title,
    methods_in_order,
    percent,
    signed,
    task_title,
    tasks_in_order,
    with_backbone,
)

METHOD, BASELINE, SCRATCH, FINETUNING = "head2toe", "linear", "scratch", "finetune"


def section(frames: Frames) -> Section | None:
    """Table, and a figure per backbone; None without results."""
    if frames.finished.empty:
        return None
    table = gain_table(frames.finished)
    parts = by_backbone(table.data)
    figures = tuple(
        figure
        for backbone, part in parts.items()
        for figure in _figures(frames.finished, part, backbone, frames.backbones)
    )
    costs = cost_table(frames.finished, frames.costs).data
    shares = costs[costs["method"] == METHOD].groupby("backbone")["flops_vs_finetuning"].median().to_dict()
    words = " ".join(_words(part, backbone, shares.get(backbone)) for backbone, part in parts.items())
    return Section(table.name, table.title, 20, words, (table,), figures, on_top="highlight")


def gain_table(results: pd.DataFrame) -> ReportTable:
    """Gains per task, in the order of domain affinity where that is known."""
    data = gains(results)
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Linear": data[BASELINE].map(percent),
            "Head2Toe": data[METHOD].map(percent),
            "Gain": data["gain"].map(signed),
            **(
                {"Over fine-tuning": data["gain_over_finetuning"].map(signed)}
                if data["gain_over_finetuning"].notna().any()
                else {}
            ),
        }
    )
    return ReportTable(
        "gain",
        "Gain of Head2Toe over linear",
        "Difference of the median test accuracies, in points of percent; tasks far from the source domain "
        "first, where there is training from scratch to tell.",
        data,
        with_backbone(data, display),
    )


def gains(results: pd.DataFrame) -> pd.DataFrame:
    """Columns backbone, task, group, linear, head2toe, gain, gain_over_finetuning (NaN where not known).

    A row per backbone and task that has linear and Head2Toe.
    """
    groups, rows = tasks_in_order(results), []
    for backbone in backbones_in_order(results):
        baseline, method = (medians(results, backbone, name) for name in (BASELINE, METHOD))
        finetuned = medians(results, backbone, FINETUNING)
        affinity = metrics.domain_affinity(baseline, medians(results, backbone, SCRATCH))
        tasks = [task for task in baseline if task in method]
        if all(task in affinity for task in tasks):
            tasks.sort(key=list(affinity).index)
        rows += [
            (
                backbone,
                task,
                groups[task],
                baseline[task],
                method[task],
                method[task] - baseline[task],
                method[task] - finetuned.get(task, math.nan),
            )
            for task in tasks
        ]
    numbers = [BASELINE, METHOD, "gain", "gain_over_finetuning"]
    data = pd.DataFrame(rows, columns=["backbone", "task", "group", *numbers])
    return data.astype(dict.fromkeys(numbers, float))


def _words(rows: pd.DataFrame, backbone: str, cost: float | None) -> str:
    """What a newcomer wants to know; ``cost``: share of the operations of fine-tuning, NaN if not known."""
    n_tasks, mean = len(rows), rows["gain"].mean()
    best = rows.to_dict("records")[int(rows["gain"].argmax())]
    words = (
        f"{backbone}: on {n_tasks} task{'s' if n_tasks > 1 else ''} Head2Toe "
        f"{'gains' if mean >= 0 else 'loses'} {percent(abs(mean))} points of accuracy "
        f"{'over' if mean >= 0 else 'against'} a linear probe on average ({signed(best['gain'])} on "
        f"{task_title(best['task'])})"
    )
    if cost is not None and not math.isnan(cost):
        words += f", at {100 * cost:.2g} % of the training operations of fine-tuning for as many steps"
    return f"{words}."


def _figures(
    results: pd.DataFrame, rows: pd.DataFrame, backbone: str, backbones: list[str]
) -> list[ReportFigure]:
    """Gains over linear and over fine-tuning, and the accuracy of every method."""
    finetuned = rows.dropna(subset="gain_over_finetuning")
    return [
        _bars(rows, "gain", "Linear", BASELINE, backbone, backbones),
        *([_bars(finetuned.assign(gain=finetuned["gain_over_finetuning"]), "gain-over-finetuning",
                 "Fine-tuning", FINETUNING, backbone, backbones)] if len(finetuned) else []),
        _methods(results[results["backbone"] == backbone], list(rows["task"]), backbone, backbones),
    ]  # fmt: skip


def _methods(results: pd.DataFrame, tasks: list[str], backbone: str, backbones: list[str]) -> ReportFigure:
    """Median accuracy of every method on every task, tasks in the order of the table."""
    methods = methods_in_order(results)
    colours = method_colours(methods)
    by_method = {method: medians(results, backbone, method) for method in methods}
    data = pd.DataFrame(
        [
            (method_title(method), task_title(task), round(100 * by_method[method][task], 2))
            for method in methods
            for task in tasks
            if task in by_method[method]
        ],
        columns=["Method", "Task", "Accuracy"],
    )
    return draw(
        figure_name("methods", backbone, backbones),
        f"Test accuracy of every method, percent, {backbone}; click on one in the legend to see it alone.",
        "The numbers are in the main table.",
        dots(data, x="Task", y="Accuracy", series="Method", colours=colours),
        data,
    )


def _bars(
    rows: pd.DataFrame, name: str, title: str, baseline: str, backbone: str, backbones: list[str]
) -> ReportFigure:
    """Bars, one per task in the order of ``rows`` from the top, coloured by group."""
    data = pd.DataFrame(
        {
            "Task": rows["task"].map(task_title),
            "Group": rows["group"],
            title: (100 * (rows[METHOD] - rows["gain"])).round(2),
            "Head2Toe": (100 * rows[METHOD]).round(2),
            "Gain": (100 * rows["gain"]).round(2),
        }
    )
    base = alt.Chart(data).encode(
        y=alt.Y("Task:N", sort=list(data["Task"]), title=None),
        x=alt.X("Gain:Q", title=f"test accuracy of Head2Toe minus {title.lower()}, points of percent"),
        tooltip=list(data.columns),
    )
    bars = base.mark_bar(size=16).encode(color=group_colours(data))
    ends = [
        base.mark_text(align=side, dx=shift, fontSize=10)
        .encode(text=alt.Text("Gain:Q", format="+.1f"))
        .transform_filter(f"datum.Gain {sign} 0")
        for side, shift, sign, some in (
            ("left", 4, ">=", data["Gain"] >= 0),
            ("right", -4, "<", data["Gain"] < 0),
        )
        if some.any()
    ]
    values = "; ".join(f"{task_title(row['task'])} {signed(row['gain'])}" for row in rows.to_dict("records"))
    return draw(
        figure_name(name, backbone, backbones),
        f"Gain of Head2Toe over {method_title(baseline).lower()}, {backbone}.",
        f"In points of percent: {values}.",
        alt.layer(bars, *ends).properties(width=WIDTH, height=alt.Step(24)),
        data,
    )
