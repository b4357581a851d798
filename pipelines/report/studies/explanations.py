"""Some predictions explained: where in the image, and at which taps, their logits come from."""

import altair as alt
import pandas as pd

from pipelines.report.figures import PALETTE, ReportFigure, draw, figure_name
from pipelines.report.frames import Frames
from pipelines.report.studies import Picture, Section, Strip, data_uri
from pipelines.report.tables import ReportTable, task_title, tasks_in_order, with_backbone

NAME, TITLE = "explanations", "Why some images are predicted as they are"
NOTE = (
    "The logit of the predicted class, by Head2Toe with the first seed, is the sum of the bias and of what "
    "each tap adds: weights times normalised features. Named are the taps that add or take most."
)
NAMED = 3  # taps of a prediction in the table


def section(frames: Frames) -> Section | None:
    """Pictures and their heat maps, a figure of taps per task, and the numbers; None without any."""
    rows = frames.explanations
    if rows.empty:
        return None
    rows = pd.concat([rows[rows["task"] == task] for task in tasks_in_order(rows)], ignore_index=True)
    pairs = rows[["task", "backbone"]].drop_duplicates().itertuples(index=False, name=None)
    groups = [
        (str(task), str(name), rows[(rows["task"] == task) & (rows["backbone"] == name)])
        for task, name in pairs
    ]
    backbones = list(dict.fromkeys(rows["backbone"]))
    strips = tuple(
        Strip(
            f"{task_title(task)}{f', {name}' * (len(backbones) > 1)}",
            tuple(picture for row in some.to_dict("records") for picture in _pictures(row)),
            large=True,
        )
        for task, name, some in groups
    )
    figures = tuple(_figure(*group, backbones) for group in groups)
    wrong = int((rows["label"] != rows["prediction"]).sum())
    words = (
        f"Shown are {len(rows)} test images, of which {wrong} are predicted wrong; red speaks for the "
        "prediction, blue against it."
    )
    return Section(NAME, TITLE, 62, words, (_table(rows),), figures, folded=True, strips=strips)


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _name(row: dict) -> str:
    said = "" if row["label"] == row["prediction"] else f", not {row['label']}"
    return f"{row['prediction']}{said}"


def _pictures(row: dict) -> tuple[Picture, Picture]:
    """The image and its heat map."""
    return (
        Picture(data_uri(row["image"]), _name(row)),
        Picture(data_uri(row["heat"]), f"why {row['prediction']}: logit {_signed(row['logit'])}"),
    )


def _figure(task: str, backbone: str, rows: pd.DataFrame, backbones: list[str]) -> ReportFigure:
    """Bars: what each tap adds, a panel per image."""
    data = pd.DataFrame(
        [
            {"Image": f"image {row['index']}: {_name(row)}", "Tap": tap, "Adds": round(part, 4)}
            for row in rows.to_dict("records")
            for tap, part in zip(row["taps"], row["parts"], strict=True)
        ]
    )
    order = list(dict.fromkeys(data["Tap"]))
    bars = alt.Chart(data).mark_bar(color=PALETTE[0])
    bars = bars.encode(
        x=alt.X("Tap:N", sort=order, axis=alt.Axis(labelAngle=-90), title=None),
        y=alt.Y("Adds:Q", title=None),
        tooltip=list(map(str, data.columns)),
    )
    header = alt.Header(labelAngle=0, labelOrient="top", labelPadding=2)
    panels = alt.Row("Image:N", title=None, sort=list(dict.fromkeys(data["Image"])), header=header)
    chart = bars.properties(width=alt.Step(14), height=60).facet(row=panels, spacing=4)
    return draw(
        figure_name(f"{NAME}-{task}", backbone, backbones),
        f"{task_title(task)}: what each tap of {backbone} adds to the logit of the prediction, from input to "
        "output.",
        "The largest are in the table of explanations.",
        chart,
        data,
    )


def _table(rows: pd.DataFrame) -> ReportTable:
    data = rows.drop(columns=["image", "heat", "taps", "parts"])
    data["most"] = [
        ", ".join(f"{tap} {_signed(part)}" for tap, part in _largest(row)) for row in rows.to_dict("records")
    ]
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Image": data["index"].astype(str),
            "Class": data["label"],
            "Prediction": data["prediction"],
            "Logit": data["logit"].map(_signed),
            "Bias": data["bias"].map(_signed),
            "Taps": data["most"],
        }
    )
    return ReportTable(NAME, TITLE, NOTE, data, with_backbone(data, display))


def _largest(row: dict) -> list[tuple[str, float]]:
    parts = zip(row["taps"], row["parts"], strict=True)
    return sorted(parts, key=lambda pair: -abs(pair[1]))[:NAMED]
