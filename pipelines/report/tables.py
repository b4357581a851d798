"""What several studies share: tables, their finished cells, and the paper's order of tasks and methods.

Result rows, here and in the studies, are those of trainings that ended well (``Frames.finished``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from h2t import metrics
from h2t.methods import METHODS
from h2t.tasks import DEMO, VTAB_1K

MISSING = "–"
GROUPS = ("natural", "specialized", "structured", "other")
MEAN = "Mean"  # header over the columns of means


@dataclass(frozen=True)
class ReportTable:
    """A table twice: ``data`` with plain numbers for programs, ``display`` with strings for readers.

    Accuracies are fractions of 1 in ``data`` and percent in ``display``; what is missing is NaN in the one
    and an en dash in the other. The columns of ``display`` may have two levels (group, name). ``bold`` lists
    the cells to stress as (row, column) positions. ``note`` says how to read the table.
    """

    name: str
    title: str
    note: str
    data: pd.DataFrame
    display: pd.DataFrame
    bold: frozenset[tuple[int, int]] = field(default_factory=frozenset)


def percent(value: float, digits: int = 1) -> str:
    """A fraction of 1 as percent; an en dash for NaN."""
    return MISSING if math.isnan(value) else f"{100 * value:.{digits}f}"


def signed(value: float) -> str:
    """A difference of fractions in points of percent, with its sign."""
    points = round(100 * value, 1) + 0.0  # no minus before a zero
    return MISSING if math.isnan(value) else f"{points:+.1f}".replace("-", "−")


def ahead(value: float) -> str:
    """A difference of fractions in words: so many points ahead, or behind."""
    return f"{percent(abs(value))} points {'ahead of' if value >= 0 else 'behind'}"


def integer(value: float) -> str:
    """An integer with thousands set apart; an en dash for NaN."""
    return MISSING if math.isnan(value) else f"{int(value):,}"


def number(value: float, unit: str = "", digits: int = 6) -> str:
    """A number at its shortest, with a unit; an en dash for NaN."""
    return MISSING if math.isnan(value) else f"{value:.{digits}g}{unit}"


def task_title(name: str) -> str:
    """The paper's title of a task, or the name of a task that is the user's own."""
    return next((task.title for task in (*VTAB_1K, *DEMO) if task.name == name), name)


def method_title(name: str) -> str:
    """The title of a method."""
    return METHODS[name].title if name in METHODS else name


def tasks_in_order(rows: pd.DataFrame) -> dict[str, str]:
    """Task -> group, in the order of the paper's columns; a user's tasks last in their group."""
    groups = {str(task): str(group) for task, group in zip(rows["task"], rows["group"], strict=True)}
    published = [task.name for task in VTAB_1K]
    order = sorted(
        groups, key=lambda task: (_position(GROUPS, groups[task]), _position(published, task), task)
    )
    return {task: groups[task] for task in order}


def methods_in_order(rows: pd.DataFrame) -> list[str]:
    """Methods in the order of ``METHODS``."""
    return sorted(rows["method"].unique(), key=lambda method: (_position(tuple(METHODS), method), method))


def in_paper_order(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """``rows`` sorted by ``keys``, with tasks and methods in the paper's order; needs a column group."""
    orders = {"task": list(tasks_in_order(rows)), "method": methods_in_order(rows)}
    return rows.sort_values(
        keys,
        key=lambda column: column.map(orders[column.name].index) if column.name in orders else column,
        kind="stable",
        ignore_index=True,
    )


def backbones_in_order(rows: pd.DataFrame) -> list[str]:
    """Backbones by name."""
    return sorted(rows["backbone"].unique())


def by_backbone(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Backbone -> its rows, by name."""
    return {str(backbone): part for backbone, part in rows.groupby("backbone")}


def summaries(
    results: pd.DataFrame, measure: str = "test_accuracy"
) -> dict[tuple[str, str, str], metrics.Summary]:
    """(backbone, method, task) -> median and standard deviation over seeds of a column of the results."""
    groups = results.dropna(subset=measure).groupby(["backbone", "method", "task"])[measure]
    return {key: metrics.median_and_std(values) for key, values in groups}  # type: ignore[misc]


def medians(results: pd.DataFrame, backbone: str, method: str) -> dict[str, float]:
    """Task -> median test accuracy of one method, in the paper's order of tasks."""
    by_key = summaries(results[results["backbone"] == backbone])
    keys = {task: (backbone, method, task) for task in tasks_in_order(results)}
    return {task: by_key[key].median for task, key in keys.items() if key in by_key}


def statistics(results: pd.DataFrame, statistic: str, measure: str = "test_accuracy") -> pd.DataFrame:
    """One row per backbone and method; a column per task, then ``mean_<group>`` and ``mean_all``.

    ``statistic``: a field of ``metrics.Summary``. A mean is NaN unless the method has a result for every
    task that the backbone has; of a single group there is only the mean over all.
    """
    by_key, groups = summaries(results, measure), tasks_in_order(results)
    present = [group for group in GROUPS if group in groups.values()]
    averaged = [*present, "all"] if len(present) > 1 else ["all"]
    rows = []
    for backbone in backbones_in_order(results):
        tasks = tasks_in_order(results[results["backbone"] == backbone])
        for method in methods_in_order(results):
            keys = {task: (backbone, method, task) for task in tasks}
            values = {
                task: getattr(by_key[key], statistic) if key in by_key else math.nan
                for task, key in keys.items()
            }
            means = metrics.group_means(values, tasks)
            if any(key in by_key for key in keys.values()):
                titled = {f"mean_{group}": mean for group, mean in means.items() if group in averaged}
                rows.append({"backbone": backbone, "method": method} | values | titled)
    columns = [*groups, *(f"mean_{group}" for group in averaged)]
    data = pd.DataFrame(rows, columns=["backbone", "method", *columns])
    return data.astype(dict.fromkeys(columns, float))


def with_headers(data: pd.DataFrame, shown: pd.DataFrame, groups: Mapping[str, str]) -> pd.DataFrame:
    """Finished cells of ``statistics`` under two levels of headers: the group, then the task or mean.

    ``groups``: task -> group.
    """
    headers = [
        (groups[column].capitalize(), task_title(column))
        if column in groups
        else (MEAN, column.removeprefix("mean_").capitalize())
        for column in map(str, shown)
    ]
    display = shown.set_axis(pd.MultiIndex.from_tuples(headers), axis="columns")
    display.insert(0, ("", "Method"), data["method"].map(method_title))
    return with_backbone(data, display)


def with_backbone(data: pd.DataFrame, display: pd.DataFrame) -> pd.DataFrame:
    """``display`` with a first column for the backbone, where there are several."""
    if data["backbone"].nunique() > 1:
        header = ("", "Backbone") if display.columns.nlevels > 1 else "Backbone"
        display.insert(0, header, data["backbone"])
    return display


def _position(known: Sequence[str], name: str) -> int:
    return known.index(name) if name in known else len(known)
