"""Figure 11, center: how many of the features kept on one task another task, or another seed, keeps too."""

from collections import defaultdict
from itertools import product

import numpy as np
import pandas as pd

from pipelines.report.figures import ReportFigure, draw, figure_name, heat
from pipelines.report.frames import Frames
from pipelines.report.studies import Section
from pipelines.report.tables import ReportTable, percent, task_title, tasks_in_order, with_backbone

METHOD = "head2toe"
NOTE = (
    "Of the features that Head2Toe keeps on the task of the row, the percentage that it keeps on the task of "
    "the column too, in the mean over pairs of trainings; on the diagonal over pairs of different seeds. "
    "Tasks are compared where cross-validation chose the same target size for them. Chance: the fraction "
    "that the task of the column keeps of all features."
)


def section(frames: Frames) -> Section | None:
    """The table, and a figure per backbone; None without kept features of one target size."""
    data = overlaps(frames.kept)
    if data.empty:
        return None
    same, others = data[data["task"] == data["other"]], data[data["task"] != data["other"]]
    parts = [
        f"two seeds of a task share {percent(same['shared'].mean(), 0)} % of their features"
        if len(same)
        else "",
        f"two tasks {percent(others['shared'].mean(), 0)} %, where chance would give "
        f"{percent(others['chance'].mean(), 0)} %"
        if len(others)
        else "",
    ]
    words = " and ".join(filter(None, parts))
    words = f"On average, {words}."
    figures = tuple(
        _figure(data[data["backbone"] == backbone], str(backbone), frames.backbones)
        for backbone in data["backbone"].unique()
    )
    return Section("overlap", "Features shared by tasks and seeds", 75, words, (_table(data),), figures, True)


def overlaps(kept: pd.DataFrame) -> pd.DataFrame:
    """A row per backbone and pair of tasks: the share of kept features that the other keeps too."""
    rows = kept[(kept["method"] == METHOD) & kept["kept"].notna()]
    sets: dict[tuple[str, str], dict[str, np.ndarray]] = defaultdict(dict)
    sizes: dict[tuple[str, str], int] = {}
    for (backbone, task, seed), part in rows.groupby(["backbone", "task", "seed"], sort=False):
        part = part.sort_values("tap_index")
        starts = np.cumsum([0, *part["n_features"]])
        of_taps = zip(part["kept"], starts[:-1], strict=True)
        indices = [np.asarray(list(values), int) + start for values, start in of_taps]
        sets[str(backbone), str(task)][str(seed)] = np.concatenate(indices)
        sizes[str(backbone), str(task)] = int(starts[-1])
    groups, found = tasks_in_order(rows), []
    for first, other in product(sets, sets):
        if first[0] != other[0] or sizes[first] != sizes[other]:
            continue
        pairs = [
            (a, b) for (s, a), (t, b) in product(sets[first].items(), sets[other].items())
            if len(a) and (first != other or s != t)
        ]  # fmt: skip
        if pairs:
            shared = float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in pairs]))
            chance = float(np.mean([len(b) / sizes[other] for _, b in pairs]))
            found.append((first[0], first[1], groups[first[1]], other[1], shared, chance))
    data = pd.DataFrame(found, columns=["backbone", "task", "group", "other", "shared", "chance"])
    place = {task: position for position, task in enumerate(groups)}
    order = [data["backbone"], data["task"].map(place), data["other"].map(place)]
    return data.iloc[np.lexsort(order[::-1])].reset_index(drop=True)


def _table(data: pd.DataFrame) -> ReportTable:
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Other task": data["other"].map(task_title).mask(data["task"] == data["other"], "another seed"),
            "Shared": data["shared"].map(percent),
            "By chance": data["chance"].map(percent),
        }
    )
    return ReportTable("overlap", "Features shared", NOTE, data, with_backbone(data, display))


def _figure(rows: pd.DataFrame, backbone: str, backbones: list[str]) -> ReportFigure:
    """A heat map, one row and one column per task."""
    data = pd.DataFrame(
        {
            "Task": rows["task"].map(task_title),
            "Other task": rows["other"].map(task_title),
            "Shared": (100 * rows["shared"]).round(2),
            "By chance": (100 * rows["chance"]).round(2),
        }
    )
    values = "; ".join(
        f"{row['Task']} and {row['Other task']} {row['Shared']:.0f}" for row in data.to_dict("records")
    )
    return draw(
        figure_name("overlap", backbone, backbones),
        f"Features kept on the task of the row that the task of the column keeps too, percent, {backbone}.",
        f"In percent: {values}.",
        heat(data, row="Task", column="Other task", value="Shared", cell=44),
        data,
    )
