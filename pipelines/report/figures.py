"""The report's figures: matplotlib, the same bytes for the same numbers.

Ink has one near-black colour of its own, which ``inline_svg`` turns into the page's text colour, so that a
figure is legible on a light and on a dark page.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pipelines.report.tables import GROUPS, task_title, tasks_in_order

INK, PAPER = "#1c1f25", "#ffffff"
GROUP_COLOURS = dict(zip(GROUPS, ("#3f87c9", "#d9812b", "#2e9c7b", "#8a7fc0"), strict=True))
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "head2toe",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
}


def gain_figure(gains: pd.DataFrame) -> Figure:
    """Bars of Head2Toe's gain over linear, one per task, coloured by group.

    ``gains``: columns task, group, gain (a fraction of 1), in the order to draw from the top.
    """
    with _style():
        figure, axes = _canvas(7.5, 0.9 + 0.3 * len(gains))
        positions = np.arange(len(gains))
        points = 100 * gains["gain"].to_numpy(float)
        bars = axes.barh(
            positions, points, color=[GROUP_COLOURS[group] for group in gains["group"]], height=0.7
        )
        axes.bar_label(bars, fmt="%+.1f", padding=3, fontsize=8, color=INK)
        axes.set_yticks(positions, [task_title(task) for task in gains["task"]])
        axes.invert_yaxis()
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.margins(x=0.12)
        axes.set_xlabel("test accuracy of Head2Toe minus linear, points of percent")
        _group_legend(axes, set(gains["group"]))
        return figure


def kept_figure(kept: pd.DataFrame) -> Figure:
    """Where the kept features come from: tasks down, taps across, each row summing to 100 %.

    ``kept``: columns task, group, tap, tap_index, share (a fraction of 1).
    """
    order = list(tasks_in_order(kept))
    shares = kept.pivot_table(index="task", columns="tap_index", values="share").fillna(0.0).loc[order]
    names = kept.drop_duplicates("tap_index").set_index("tap_index")["tap"]
    taps = [names[index] for index in shares.columns]
    with _style():
        width = min(max(4.0, 2.2 + 0.19 * len(taps)), 13.0)
        longest = max(len(tap) for tap in taps)
        figure, axes = _canvas(width, 0.9 + 0.3 * len(shares) + 0.07 * longest)
        mesh = axes.pcolormesh(100 * shares.to_numpy(), cmap="viridis", edgecolors="none")
        axes.set_yticks(np.arange(len(shares)) + 0.5, [task_title(task) for task in shares.index])
        axes.set_xticks(np.arange(len(taps)) + 0.5, taps, rotation=90, fontsize=7)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set_xlabel("tap, from the input to the output")
        bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.05)
        bar.set_label("% of the kept features")
        bar.outline.set_visible(False)
        return figure


def affinity_figure(affinities: pd.DataFrame) -> Figure:
    """Head2Toe's gain against domain affinity, one labelled point per task (the paper's Figure 2).

    ``affinities``: columns task, group, affinity, gain (fractions of 1).
    """
    with _style():
        figure, axes = _canvas(7.5, 4.2)
        for group in GROUPS:
            rows = affinities[affinities["group"] == group]
            axes.scatter(
                100 * rows["affinity"], 100 * rows["gain"], s=40, color=GROUP_COLOURS[group], zorder=3
            )
        for row in affinities.to_dict("records"):
            place = (100 * row["affinity"], 100 * row["gain"])
            axes.annotate(task_title(row["task"]), place, (5, 4), textcoords="offset points", fontsize=8)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.margins(0.12)
        axes.set_xlabel("domain affinity (linear minus scratch), points of percent")
        axes.set_ylabel("gain of Head2Toe over linear, points")
        _group_legend(axes, set(affinities["group"]))
        return figure


def svg_text(figure: Figure) -> str:
    """A figure as a whole SVG file: dark ink on white."""
    with _style(), io.BytesIO() as sink:
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
        return sink.getvalue().decode()


def png_bytes(figure: Figure) -> bytes:
    """A figure as a PNG file: dark ink on white, 160 pixels an inch."""
    with _style(), io.BytesIO() as sink:
        figure.savefig(sink, format="png", dpi=160, metadata={"Software": None})
        return sink.getvalue()


def inline_svg(name: str, svg: str) -> str:
    """The ``<svg>`` element of a file, for a page: transparent, in its text colour, ids after ``name``."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure in inches that no interactive backend knows of."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _group_legend(axes: Axes, groups: set[str]) -> None:
    if len(groups) > 1:
        handles = [Patch(color=GROUP_COLOURS[group], label=group) for group in GROUPS if group in groups]
        axes.legend(handles=handles, frameon=False, loc="best", fontsize=8)
