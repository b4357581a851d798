"""Which taps the kept features come from."""

import numpy as np
import pandas as pd

from h2t.methods import METHODS
from pipelines.report.figures import ReportFigure, draw, figure_name, heat
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import (
    MISSING,
    ReportTable,
    method_title,
    methods_in_order,
    percent,
    task_title,
    tasks_in_order,
    with_backbone,
)

METHOD = "head2toe"  # the figures of others have its name behind


def section(frames: Frames) -> Section | None:
    """A figure per backbone and method that keeps some features, and the numbers; None without any."""
    # The others keep all or none of a tap.
    choosy = [name for name, method in METHODS.items() if method.features == "kept"]
    kept = frames.kept[frames.kept["method"].isin(choosy)]
    if kept.empty:
        return None
    table = kept_table(kept)
    shares = table.data.dropna(subset="share")
    figures = tuple(
        _figure(shares[(shares["backbone"] == backbone) & (shares["method"] == method)], frames.backbones)
        for backbone in frames.backbones
        for method in methods_in_order(shares[shares["backbone"] == backbone])
    )
    last = shares.groupby(["backbone", "method", "task"])["tap_index"].transform("max")
    embedding = shares.loc[shares["tap_index"] == last, "share"].mean()
    words = (
        f"On average, {percent(embedding)} % of the kept features come from the last tap." if figures else ""
    )
    return Section(table.name, table.title, 70, words, (table,), figures, folded=True)


def kept_table(kept: pd.DataFrame) -> ReportTable:
    """How many features of each tap were kept: mean over seeds, a column per task."""
    keys = ["backbone", "method", "tap_index", "tap"]
    data = kept.groupby([*keys, "task", "group"], as_index=False)[["n_features", "n_kept"]].mean()
    totals = data.groupby(["backbone", "method", "task"])["n_kept"].transform("sum")
    data["share"] = data["n_kept"] / totals.where(totals > 0)
    wide = data.pivot_table(index=keys, columns="task", values="n_kept")[list(tasks_in_order(data))]
    wide = wide.reset_index()
    display = pd.DataFrame({"Method": wide["method"].map(method_title), "Tap": wide["tap"]})
    for task in tasks_in_order(data):
        display[task_title(task)] = wide[task].map(_count)
    return ReportTable(
        "kept_features",
        "Features kept per tap",
        "Number of features kept of each tap, in network order; mean over seeds.",
        data,
        with_backbone(wide, display),
    )


def _count(value: float) -> str:
    return MISSING if np.isnan(value) else f"{value:,.1f}".removesuffix(".0")


def _figure(rows: pd.DataFrame, backbones: list[str]) -> ReportFigure:
    """Tasks down, taps across, each row of colours summing to 100 %."""
    backbone, method = rows["backbone"].iloc[0], rows["method"].iloc[0]
    order = list(tasks_in_order(rows))
    rows = rows.sort_values(
        ["task", "tap_index"], key=lambda c: c.map(order.index) if c.name == "task" else c
    )
    data = pd.DataFrame(
        {
            "Task": rows["task"].map(task_title),
            "Tap": rows["tap"],
            "Share": (100 * rows["share"]).round(3),
            "Kept": rows["n_kept"].round(1),
            "Features": rows["n_features"],
        }
    )
    return draw(
        figure_name("kept_features" if method == METHOD else f"kept_features-{method}", backbone, backbones),
        f"Where the features that {method_title(method)} keeps come from, {backbone}: percent of the kept "
        "features that each tap has, from the input to the output; each row adds up to 100 %.",
        "The numbers are in the table of features kept per tap.",
        heat(data, row="Task", column="Tap", value="Share"),
        data,
    )
