"""Domain affinity (section 2) and Head2Toe's gain: Figure 2."""

import math
from itertools import combinations

import altair as alt
import pandas as pd

from h2t import metrics, paper
from pipelines.report.figures import WIDTH, ReportFigure, draw, figure_name, group_colours
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.studies.gain import BASELINE, SCRATCH, gains
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

NOTE = (
    "Linear minus scratch, in points of percent, lowest (farthest from the source domain) first. The paper's "
    "is with ResNet-50, from its Table 1."
)


def section(frames: Frames) -> Section | None:
    """Table, and a figure per backbone with gains; None unless a task has linear and scratch."""
    table = affinity_table(frames.finished)
    if table is None:
        return None
    gained = by_backbone(table.data.dropna(subset="gain"))
    figures = tuple(_figure(part, backbone, frames.backbones) for backbone, part in gained.items())
    words = []
    for backbone, part in by_backbone(table.data).items():
        farthest, nearest = (
            f"{task_title(row['task'])} ({signed(row['affinity'])})"
            for row in part.iloc[[0, -1]].to_dict("records")
        )
        words.append(f"{backbone}: {farthest} is farthest from the source domain, {nearest} nearest.")
    return Section(table.name, table.title, 40, " ".join(words), (table,), figures)


def affinity_table(results: pd.DataFrame) -> ReportTable | None:
    """Affinity and gain per task, lowest affinity first; None unless a task has linear and scratch."""
    data = affinities(results)
    if data.empty:
        return None
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Linear": data[BASELINE].map(percent),
            "Scratch": data[SCRATCH].map(percent),
            "Affinity": data["affinity"].map(signed),
            "Gain of Head2Toe": data["gain"].map(signed),
            "Affinity in the paper": data["paper_affinity"].map(signed),
        }
    )
    ranks = correlations(data)
    if ranks:
        resnet, vit = (paper.gain_correlation(backbone) for backbone in ("resnet50", "vitb16"))
        ranks.append(
            f"The paper's Table 1 gives {resnet:.2f} (ResNet-50) and {vit:.2f} (ViT-B/16) for gain with "
            f"affinity, {paper.affinity_correlation():.2f} for affinity between the two."
        )
    return ReportTable(
        "affinity", "Domain affinity", " ".join([NOTE, *ranks]), data, with_backbone(data, display)
    )


def affinities(results: pd.DataFrame) -> pd.DataFrame:
    """A row per backbone and task that has linear and scratch; the gain is NaN without Head2Toe."""
    gain = gains(results).set_index(["backbone", "task"])["gain"].to_dict()
    printed, groups = paper.domain_affinity("resnet50"), tasks_in_order(results)
    columns = ["backbone", "task", "group", BASELINE, SCRATCH, "affinity", "gain", "paper_affinity"]
    rows = []
    for backbone in backbones_in_order(results):
        linear, scratch = (medians(results, backbone, method) for method in (BASELINE, SCRATCH))
        for task, affinity in metrics.domain_affinity(linear, scratch).items():
            in_paper = printed.get(task_title(task), math.nan) / 100
            accuracies = (linear[task], scratch[task], affinity)
            gained = gain.get((backbone, task), math.nan)
            rows.append((backbone, task, groups[task], *accuracies, gained, in_paper))
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[3:], float))


def correlations(affinities: pd.DataFrame) -> list[str]:
    """Spearman's correlations as in sections 2 and 3.2 and Appendix F of the paper, a sentence each.

    The gain is Head2Toe's, where section 3.2 has that of the best single layer beside the embedding.
    """
    parts = {backbone: rows.set_index("task") for backbone, rows in by_backbone(affinities).items()}
    pairs = []
    for backbone, rows in parts.items():
        pairs.append((f"gain with affinity, {backbone}", rows[["affinity", "gain"]]))
        pairs.append((f"affinity with the paper's, {backbone}", rows[["affinity", "paper_affinity"]]))
    for first, second in combinations(parts, 2):
        columns = [parts[first]["affinity"], parts[second]["affinity"]]
        pairs.append((f"affinity of {first} with that of {second}", pd.concat(columns, axis=1, join="inner")))
    sentences = []
    for title, pair in pairs:
        first_column, second_column = pair.dropna().to_numpy(float).T.tolist()
        rank = metrics.spearman(first_column, second_column)
        if not math.isnan(rank):
            n_tasks = len(first_column)
            sentences.append(f"Spearman's correlation of {title}: {rank:.2f} over {n_tasks} tasks.")
    return sentences


def _figure(rows: pd.DataFrame, backbone: str, backbones: list[str]) -> ReportFigure:
    """One labelled point per task."""
    data = pd.DataFrame(
        {
            "Task": rows["task"].map(task_title),
            "Group": rows["group"],
            "Affinity": (100 * rows["affinity"]).round(2),
            "Gain": (100 * rows["gain"]).round(2),
        }
    )
    base = alt.Chart(data).encode(
        x=alt.X("Affinity:Q", title="domain affinity (linear minus scratch), points of percent"),
        y=alt.Y("Gain:Q", title="gain of Head2Toe over linear, points"),
        tooltip=["Task", "Group", "Affinity", "Gain"],
    )
    points = base.mark_point(filled=True, size=70, opacity=1).encode(color=group_colours(data))
    names = base.mark_text(align="left", dx=7, dy=-5).encode(text="Task:N")
    return draw(
        figure_name("affinity", backbone, backbones),
        f"Gain of Head2Toe against domain affinity, {backbone}. Far tasks are on the left.",
        "The numbers are in the table of domain affinity.",
        (points + names).properties(width=WIDTH, height=300),
        data,
    )
