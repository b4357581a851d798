"""What the figures share: Vega-Altair, one look, and the same bytes for the same numbers.

Altair, because one description of a figure gives the SVG and PNG files (without a browser), and on the page
readers can point at values and choose from legends; its JavaScript is 0.9 MB, where Plotly's is 4.5 MB, and
it draws SVG, which prints and scales, where Bokeh paints pixels. Ink has one near-black colour for itself,
which the page turns into its text colour, so that a figure is legible on a light and on a dark page.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from h2t.methods import METHODS
from pipelines.report.tables import GROUPS, method_title

INK, PAPER = "#1c1f25", "#ffffff"
GROUP_COLOURS = dict(zip(GROUPS, ("#3f87c9", "#d9812b", "#2e9c7b", "#8a7fc0"), strict=True))
# Paul Tol's "muted" colours, which the colour-blind tell apart; a second round of methods has other shapes.
PALETTE = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddaa33", "#cc6677", "#882255", "#aa4499")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
WIDTH = 560  # pixels of a figure of its own
SMALL = 190  # of one of several side by side
CONFIG: dict[str, Any] = {
    "background": PAPER,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {"labelColor": INK, "titleColor": INK, "domainColor": INK, "tickColor": INK, "grid": False,
             "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 11, "labelLimit": 260},
    "axisY": {"grid": True, "gridColor": INK, "gridOpacity": 0.1},
    "legend": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal", "symbolStrokeWidth": 2,
               "labelLimit": 260},
    "header": {"labelColor": INK, "titleColor": INK, "labelFontSize": 11},
    "text": {"color": INK},
    "rule": {"color": INK},
    "line": {"strokeWidth": 2},
}  # fmt: skip


@dataclass(frozen=True)
class ReportFigure:
    """A figure: its caption, what it shows in words for those who cannot see it, and its Vega-Lite."""

    name: str
    caption: str
    description: str
    spec: Mapping[str, Any]
    data: pd.DataFrame

    @cached_property
    def svg(self) -> str:
        """Dark ink on white."""
        return _numbered_anew(vl_convert.vegalite_to_svg(dict(self.spec)))

    @cached_property
    def png(self) -> bytes:
        """Likewise, 192 pixels an inch."""
        return bytes(vl_convert.vegalite_to_png(dict(self.spec), scale=2))


def draw(name: str, caption: str, description: str, chart: Any, data: pd.DataFrame) -> ReportFigure:
    """A figure from a chart of Altair, in our style; ``data``: the numbers behind it."""
    with alt.data_transformers.enable("default", max_rows=None):
        spec = chart.to_dict()
    return ReportFigure(name, caption, description, {**spec, "config": CONFIG}, data)


def _numbered_anew(svg: str) -> str:
    """An SVG whose ids do not say how many were drawn before it in this process."""
    numbers: dict[str, int] = {}
    return re.sub(
        r"\b(gradient_|clip)(\d+)\b", lambda id: f"{id[1]}{numbers.setdefault(id[0], len(numbers))}", svg
    )


def page_specs(figures: Sequence[ReportFigure]) -> str:
    """The figures by name as JSON for a script of the page, in its text colour on nothing."""
    text = json.dumps({figure.name: figure.spec for figure in figures}, separators=(",", ":"))
    text = text.replace(INK, "currentColor").replace(f'"background":"{PAPER}"', '"background":"transparent"')
    return text.replace("<", "\\u003c")  # a title could end the script


def script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that loads nothing."""
    bundle = str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # which has defaults
    return bundle.replace("</script", "<\\/script")


def figure_name(name: str, backbone: str, backbones: Sequence[str]) -> str:
    """The name of one backbone's figure, fit for a file and a link; of a single backbone it is ``name``."""
    return name if len(backbones) == 1 else re.sub(r"[^\w.-]+", "-", f"{name}-{backbone}").rstrip("-")


def inline_svg(name: str, svg: str) -> str:
    """The ``<svg>`` element of a file, for a page: transparent, in its text colour, ids after ``name``."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = svg.replace(f'fill="{PAPER}"', 'fill="none"', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


# Charts. Columns are named as readers see them; accuracies are in percent.


def group_colours(data: pd.DataFrame) -> alt.Color:
    """The colour of the column ``Group``, with a legend where there are several."""
    shown = [group for group in GROUPS if group in set(data["Group"])]
    legend = alt.Legend(title=None, orient="top") if len(shown) > 1 else None
    return alt.Color("Group:N", scale=alt.Scale(domain=shown, range=[GROUP_COLOURS[g] for g in shown]),
                     legend=legend)  # fmt: skip


def method_colours(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Title -> colour and shape of methods: the same in every figure of every run."""
    order = list(METHODS)
    places = {name: order.index(name) if name in order else len(order) for name in names}
    return {
        method_title(name): (PALETTE[place % len(PALETTE)], SHAPES[place // len(PALETTE) % len(SHAPES)])
        for name, place in places.items()
    }


def heat(
    data: pd.DataFrame, *, row: str, column: str, value: str, diverging: bool = False, cell: int = 0
) -> Any:
    """A heat map of a column of numbers, rows and columns in the order of the data.

    ``cell``: pixels a side of a cell that also shows its number; 0: cells as narrow as fits, without numbers.
    """
    rows, columns = list(dict.fromkeys(data[row])), list(dict.fromkeys(data[column]))
    limit = float(data[value].abs().max() or 1)
    scale = alt.Scale(scheme="blueorange", reverse=True, domain=[-limit, limit]) if diverging else alt.Scale(
        scheme="viridis", domainMin=0)  # fmt: skip
    narrow = max(7.0, min(cell or 18, 900 / len(columns)))
    base = alt.Chart(data).encode(
        x=alt.X(f"{column}:N", sort=columns, axis=alt.Axis(labelAngle=-90 if not cell else -45)),
        y=alt.Y(f"{row}:N", sort=rows, axis=alt.Axis(grid=False)),
        tooltip=list(map(str, data.columns)),
    )
    chart = base.mark_rect().encode(
        color=alt.Color(f"{value}:Q", scale=scale, legend=alt.Legend(orient="right" if not cell else "top"))
    )
    chart = chart.properties(width=alt.Step(cell or narrow), height=alt.Step(cell or 22))
    if not cell:
        return chart
    dark = f"datum['{value}'] < {0.6 * limit}" if not diverging else f"abs(datum['{value}']) > {0.7 * limit}"
    numbers = base.mark_text(fontSize=10).encode(
        text=alt.Text(f"{value}:Q", format="+.1f" if diverging else ".0f"),
        color=alt.condition(dark, alt.value("white"), alt.value("#000000")),
    )
    return chart + numbers


def lines(
    data: pd.DataFrame,
    *,
    x: str,
    y: str,
    series: str,
    colours: Mapping[str, tuple[str, str]],
    panel: str | None = None,
    log: bool = False,
    points: bool = True,
) -> Any:
    """Lines, with points or not, one per series; readers choose among them in the legend.

    ``panel``: a column that says which of several small figures side by side a row belongs to.
    """
    chosen = alt.selection_point(fields=[series], bind="legend")
    shown = [name for name in colours if name in set(data[series])]
    legend = alt.Legend(title=None, orient="top", columns=3) if len(shown) > 1 else None
    scale = {"domain": shown}
    chart = (
        alt.Chart(data)
        .mark_line(point=alt.OverlayMarkDef(filled=True, size=45 if points else 12))
        .encode(
            x=alt.X(f"{x}:Q", scale=alt.Scale(type="log" if log else "linear", nice=not log)),
            y=alt.Y(f"{y}:Q", scale=alt.Scale(zero=False)),
            color=alt.Color(
                f"{series}:N", scale=alt.Scale(**scale, range=[colours[n][0] for n in shown]), legend=legend
            ),
            shape=alt.Shape(
                f"{series}:N", scale=alt.Scale(**scale, range=[colours[n][1] for n in shown]), legend=legend
            ),
            opacity=alt.condition(chosen, alt.value(1), alt.value(0.15)),
            tooltip=list(map(str, data.columns)),
        )
        .add_params(chosen)
    )
    if panel is None:
        return chart.properties(width=WIDTH, height=260)
    small = chart.properties(width=SMALL, height=130)
    order = list(dict.fromkeys(data[panel]))
    facet = alt.Facet(f"{panel}:N", title=None, sort=order)
    panels = small.facet(facet=facet, columns=3, spacing=14)
    return panels.resolve_scale(y="independent").resolve_axis(x="independent")


def dots(data: pd.DataFrame, *, x: str, y: str, series: str, colours: Mapping[str, tuple[str, str]]) -> Any:
    """A point for each row over named places, in the data's order, joined by thin lines within a series."""
    chosen = alt.selection_point(fields=[series], bind="legend")
    shown = [name for name in colours if name in set(data[series])]
    scale, legend = {"domain": shown}, alt.Legend(title=None, orient="right")
    base = alt.Chart(data).encode(
        x=alt.X(f"{x}:N", sort=list(dict.fromkeys(data[x])), title=None, axis=alt.Axis(labelAngle=-45)),
        y=alt.Y(f"{y}:Q", scale=alt.Scale(zero=False)),
        color=alt.Color(
            f"{series}:N", scale=alt.Scale(**scale, range=[colours[n][0] for n in shown]), legend=legend
        ),
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.1)),
    )
    points = base.mark_point(filled=True, size=70).encode(
        shape=alt.Shape(
            f"{series}:N", scale=alt.Scale(**scale, range=[colours[n][1] for n in shown]), legend=legend
        ),
        tooltip=list(map(str, data.columns)),
    )
    joined = base.mark_line(strokeWidth=1)
    width = alt.Step(max(36, 480 // max(data[x].nunique(), 1)))
    return alt.layer(joined.add_params(chosen), points).properties(width=width, height=300)


def intervals(data: pd.DataFrame, *, y: str, panel: str | None = None) -> Any:
    """A dot for each row's ``Accuracy`` and a line from its ``Low`` to its ``High``, in the data's order."""
    order = list(dict.fromkeys(data[y]))
    base = alt.Chart(data).encode(
        y=alt.Y(f"{y}:N", sort=order, title=None), tooltip=list(map(str, data.columns))
    )
    title = "test accuracy, percent"
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("Low:Q", title=title), x2="High:Q")
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=alt.X("Accuracy:Q", title=title, scale=alt.Scale(zero=False)), color=alt.value(PALETTE[0])
    )
    chart = alt.layer(bars, dots)
    if panel is None:
        return chart.properties(width=WIDTH, height=alt.Step(24))
    facet = alt.Facet(f"{panel}:N", title=None, sort=list(dict.fromkeys(data[panel])))
    small = chart.properties(width=SMALL, height=alt.Step(20))
    return small.facet(facet=facet, columns=3, spacing=14).resolve_scale(x="independent")
