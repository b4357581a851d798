"""What the figures share: matplotlib, the same bytes for the same numbers.

Ink has one near-black colour for itself, which ``inline_svg`` turns into the page's text colour, so that a
figure is legible on a light and on a dark page.
"""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pipelines.report.tables import GROUPS

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


@dataclass(frozen=True)
class ReportFigure:
    """A figure, its caption, and what it shows in words for those who cannot see it."""

    name: str
    caption: str
    description: str
    svg: str
    png: bytes


def draw(
    name: str, caption: str, description: str, size: tuple[float, float], fill: Callable[[Axes], None]
) -> ReportFigure:
    """The figure that ``fill`` draws into axes of ``size`` inches, in our style whatever the user's is.

    SVG and PNG (160 pixels an inch) both have dark ink on white.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=size, layout="constrained")  # no interactive backend knows of it
        fill(figure.add_subplot())
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return ReportFigure(name, caption, description, svg.getvalue().decode(), png.getvalue())


def figure_name(name: str, backbone: str, backbones: Sequence[str]) -> str:
    """The name of one backbone's figure, fit for a file and a link; of a single backbone it is ``name``."""
    return name if len(backbones) == 1 else re.sub(r"[^\w.-]+", "-", f"{name}-{backbone}").rstrip("-")


def group_legend(axes: Axes, groups: Iterable[str]) -> None:
    """Explain the colours of groups of tasks, where there are several."""
    shown = [group for group in GROUPS if group in set(groups)]
    if len(shown) > 1:
        handles = [Patch(color=GROUP_COLOURS[group], label=group) for group in shown]
        axes.legend(handles=handles, frameon=False, loc="best", fontsize=8)


def inline_svg(name: str, svg: str) -> str:
    """The ``<svg>`` element of a file, for a page: transparent, in its text colour, ids after ``name``."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
