"""What Head2Toe gains over the linear probe, per task."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from h2t import metrics
from pipelines.report.figures import GROUP_COLOURS, INK, ReportFigure, draw, figure_name, group_legend
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import (
    ReportTable,
    backbones_in_order,
    by_backbone,
    medians,
    percent,
    signed,
    task_title,
    tasks_in_order,
    with_backbone,
)

METHOD, BASELINE, SCRATCH = "head2toe", "linear", "scratch"


def section(frames: Frames) -> Section | None:
    """Table, and a figure per backbone; None without results."""
    if frames.finished.empty:
        return None
    table = gain_table(frames.finished)
    parts = by_backbone(table.data)
    figures = tuple(_figure(part, backbone, frames.backbones) for backbone, part in parts.items())
    words = " ".join(_words(part, backbone) for backbone, part in parts.items())
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
        }
    )
    return ReportTable(
        "gain",
        "Gain of Head2Toe over linear",
        "Difference of the median test accuracies, in points of percent.",
        data,
        with_backbone(data, display),
    )


def gains(results: pd.DataFrame) -> pd.DataFrame:
    """Columns backbone, task, group, linear, head2toe, gain: a row per backbone and task that has both."""
    groups, rows = tasks_in_order(results), []
    for backbone in backbones_in_order(results):
        baseline, method = (medians(results, backbone, name) for name in (BASELINE, METHOD))
        affinity = metrics.domain_affinity(baseline, medians(results, backbone, SCRATCH))
        tasks = [task for task in baseline if task in method]
        if all(task in affinity for task in tasks):
            tasks.sort(key=list(affinity).index)
        rows += [
            (backbone, task, groups[task], baseline[task], method[task], method[task] - baseline[task])
            for task in tasks
        ]
    data = pd.DataFrame(rows, columns=["backbone", "task", "group", BASELINE, METHOD, "gain"])
    return data.astype({BASELINE: float, METHOD: float, "gain": float})


def _words(rows: pd.DataFrame, backbone: str) -> str:
    won, tasks = int((rows["gain"] > 0).sum()), f"{len(rows)} task{'s' if len(rows) > 1 else ''}"
    best = rows.to_dict("records")[int(rows["gain"].argmax())]
    return (
        f"{backbone}: Head2Toe beats the linear probe on {won} of {tasks}; its mean gain is "
        f"{signed(rows['gain'].mean())} points, its largest {signed(best['gain'])} on "
        f"{task_title(best['task'])}."
    )


def _figure(rows: pd.DataFrame, backbone: str, backbones: list[str]) -> ReportFigure:
    """Bars, one per task in the order of ``rows`` from the top, coloured by group."""

    def fill(axes: Axes) -> None:
        positions, points = np.arange(len(rows)), 100 * rows["gain"].to_numpy(float)
        colours = [GROUP_COLOURS[group] for group in rows["group"]]
        bars = axes.barh(positions, points, color=colours, height=0.7)
        axes.bar_label(bars, fmt="%+.1f", padding=3, fontsize=8, color=INK)
        axes.set_yticks(positions, [task_title(task) for task in rows["task"]])
        axes.invert_yaxis()
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.margins(x=0.12)
        axes.set_xlabel("test accuracy of Head2Toe minus linear, points of percent")
        group_legend(axes, rows["group"])

    values = "; ".join(f"{task_title(row['task'])} {signed(row['gain'])}" for row in rows.to_dict("records"))
    return draw(
        figure_name("gain", backbone, backbones),
        f"Gain of Head2Toe over the linear probe, {backbone}.",
        f"In points of percent: {values}.",
        (7.5, 0.9 + 0.3 * len(rows)),
        fill,
    )
