"""The report's tables, as pure functions of the result frames.

A table comes twice: ``data`` with plain numbers (accuracies as fractions of 1) for programs, ``display`` with
finished cells (percent) for readers. What is missing is NaN in the one and an en dash in the other.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from h2t import metrics
from h2t.errors import UserError
from h2t.methods import METHODS
from h2t.tasks import VTAB_1K, find_task

MISSING = "–"
DONE = "done"
GROUPS = ("natural", "specialized", "structured", "other")
ALL = "all"
MEAN = "Mean"  # header over the columns of means


@dataclass(frozen=True)
class ReportTable:
    """One table of the report.

    ``display`` holds strings; its columns may have two levels (group, name). ``bold`` lists the cells to
    stress as (row, column) positions. ``note`` says how to read the table.
    """

    name: str
    title: str
    note: str
    data: pd.DataFrame
    display: pd.DataFrame
    bold: frozenset[tuple[int, int]] = field(default_factory=frozenset)


def finished(results: pd.DataFrame) -> pd.DataFrame:
    """The result rows that ended well: those with status "done" (or none) and an accuracy."""
    if "status" in results:
        results = results[results["status"].fillna(DONE) == DONE]
    return results[results["test_accuracy"].notna()]


def percent(value: float, digits: int = 1) -> str:
    """A fraction of 1 as percent; an en dash for NaN."""
    return MISSING if math.isnan(value) else f"{100 * value:.{digits}f}"


def signed(value: float) -> str:
    """A difference of fractions in points of percent, with its sign."""
    return MISSING if math.isnan(value) else f"{100 * value:+.1f}".replace("-", "−")


def task_title(name: str) -> str:
    """The paper's title of a task, or the name of a task that is the user's own."""
    try:
        return find_task(name).title
    except UserError:
        return name


def method_title(name: str) -> str:
    """The paper's title of a method."""
    return METHODS[name].title if name in METHODS else name


def tasks_in_order(rows: pd.DataFrame) -> dict[str, str]:
    """Task -> group, in the order of the paper's columns; a user's own tasks last in their group."""
    found = {str(task): str(group) for task, group in zip(rows["task"], rows["group"], strict=True)}
    rank = {task.name: position for position, task in enumerate(VTAB_1K)}
    order = sorted(found, key=lambda task: (_position(GROUPS, found[task]), rank.get(task, len(rank)), task))
    return {task: found[task] for task in order}


def methods_in_order(rows: pd.DataFrame) -> list[str]:
    """Methods in the paper's order."""
    return sorted(rows["method"].unique(), key=lambda method: (_position(tuple(METHODS), method), method))


def in_paper_order(rows: pd.DataFrame, results: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """``rows`` sorted by ``keys``, with tasks and methods in the order they have in ``results``."""
    ranks = {
        "task": {task: position for position, task in enumerate(tasks_in_order(results))},
        "method": {method: position for position, method in enumerate(methods_in_order(results))},
    }

    def rank(column: pd.Series) -> pd.Series:
        return column.map(ranks[str(column.name)]) if column.name in ranks else column

    return rows.sort_values(keys, key=rank).reset_index(drop=True)


def backbones_in_order(rows: pd.DataFrame) -> list[str]:
    """Backbones by name."""
    return sorted(rows["backbone"].unique())


def summaries(results: pd.DataFrame) -> dict[tuple[str, str, str], metrics.Summary]:
    """(backbone, method, task) -> median and standard deviation over the seeds that ended well."""
    groups = finished(results).groupby(["backbone", "method", "task"])["test_accuracy"]
    return {key: metrics.median_and_std(values) for key, values in groups}  # type: ignore[misc]


def medians(results: pd.DataFrame, backbone: str, method: str) -> dict[str, float]:
    """Task -> median test accuracy of one method, in the paper's order of tasks."""
    found = summaries(results)
    keys = ((task, (backbone, method, task)) for task in tasks_in_order(results))
    return {task: found[key].median for task, key in keys if key in found}


def accuracy_table(results: pd.DataFrame) -> ReportTable:
    """Table 1: median test accuracy over seeds, best in bold."""
    data = _wide(results, "median")
    values = [column for column in data if column not in ("backbone", "method")]
    shown = data[values].map(percent)
    return ReportTable(
        "table1",
        "Test accuracy",
        "Median over seeds, in percent; the best of each column in bold. A mean is shown where the method "
        "has a result for every task of the backbone. The mean over all tasks weighs every task alike.",
        data,
        _titled(data, shown, results),
        _best(data, shown),
    )


def deviation_table(results: pd.DataFrame) -> ReportTable:
    """Table 4: sample standard deviation over seeds."""
    data = _wide(results, "std")
    values = [column for column in data if column not in ("backbone", "method")]
    single = {key for key, summary in summaries(results).items() if summary.n == 1}
    shown = data[values].map(lambda value: percent(value, 2))
    for row, (backbone, method) in enumerate(zip(data["backbone"], data["method"], strict=True)):
        for column, task in enumerate(values):
            if (backbone, method, task) in single:
                shown.iat[row, column] = "1 seed"
    return ReportTable(
        "table4",
        "Standard deviation over seeds",
        "Sample standard deviation of the test accuracy, in points of percent; a single seed has none.",
        data,
        _titled(data, shown, results),
    )


def hyperparameter_table(selected: pd.DataFrame) -> ReportTable:
    """Table 2: the hyperparameters that cross-validation chose, per task and method."""
    data = in_paper_order(selected, selected, ["backbone", "task", "method"])
    uses = data["method"].map(lambda name: METHODS[name].features if name in METHODS else "all")
    display = pd.DataFrame(
        {
            "Task": data["task"].map(task_title),
            "Method": data["method"].map(method_title),
            "T": data["target_size"].map(integer).mask(uses == "embedding", MISSING),
            "F": data["keep_fraction"].map(number).mask(uses != "selected", MISSING),
            "Learning rate": data["learning_rate"].map(number),
            "Steps": data["steps"].map(integer),
            "Coefficient": data["coefficient"].map(number).mask(data["coefficient"].fillna(0) == 0, MISSING),
            "Validation": data["validation_accuracy"].map(percent),
            "± folds": data["validation_std"].map(percent),
            "Candidates": data["n_candidates"].map(integer),
        }
    )
    return ReportTable(
        "table2",
        "Chosen hyperparameters",
        "What cross-validation chose. T: target size of a tap's features; F: fraction of features kept; "
        "coefficient: the regularizer's; validation: mean accuracy over folds in percent, and its deviation.",
        data,
        with_backbone(data, display),
    )


def of_selecting_methods(kept: pd.DataFrame) -> pd.DataFrame:
    """The rows of methods that select features; the others keep all or none of a tap."""
    selecting = [name for name, method in METHODS.items() if method.features == "selected"]
    return kept[kept["method"].isin(selecting)] if len(kept) else kept


def kept_table(kept: pd.DataFrame) -> ReportTable:
    """How many features of each tap were kept: mean over seeds, per task and method that selects."""
    keys = ["backbone", "method", "tap_index", "tap", "task"]
    data = kept.groupby(keys, as_index=False)[["n_features", "n_kept"]].mean()
    totals = data.groupby(["backbone", "method", "task"])["n_kept"].transform("sum")
    data["share"] = data["n_kept"] / totals.where(totals > 0)
    data["group"] = data["task"].map(_known_group)
    tasks = list(tasks_in_order(data))
    data = data.sort_values(keys[:-1], kind="stable").reset_index(drop=True)
    wide = data.pivot_table(index=["backbone", "method", "tap_index", "tap"], columns="task", values="n_kept")
    wide = wide[tasks].reset_index()
    display = pd.DataFrame({"Method": wide["method"].map(method_title), "Tap": wide["tap"]})
    for task in tasks:
        display[task_title(task)] = wide[task].map(_count)
    return ReportTable(
        "kept_features",
        "Features kept per tap",
        "Number of features kept of each tap, in network order; mean over seeds.",
        data,
        with_backbone(wide, display),
    )


def problem_table(name: str, title: str, rows: pd.DataFrame, limit: int = 50) -> ReportTable:
    """Rows that were skipped or failed, the first ``limit`` of them on display."""
    shown = rows.head(limit).astype(object)
    display = shown.where(shown.notna(), MISSING).astype(str).reset_index(drop=True)
    note = f"{len(rows)} in all" + (f", the first {limit} shown." if len(rows) > limit else ".")
    return ReportTable(name, title, note, rows.reset_index(drop=True), display)


def _position(known: tuple[str, ...], name: str) -> int:
    return known.index(name) if name in known else len(known)


def _known_group(task: str) -> str:
    try:
        return find_task(task).group
    except UserError:
        return "other"


def _wide(results: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """One row per backbone and method; a column per task, group mean and the mean over all."""
    found = summaries(results)
    groups = tasks_in_order(results)
    rows = []
    for backbone in backbones_in_order(results):
        own = tasks_in_order(results[results["backbone"] == backbone])
        for method in methods_in_order(results):
            keys = {task: (backbone, method, task) for task in own}
            values = {task: getattr(found[key], statistic) for task, key in keys.items() if key in found}
            if values:
                rows.append({"backbone": backbone, "method": method} | values | _means(values, own))
    columns = ["backbone", "method", *groups, *(f"mean_{group}" for group in _mean_groups(groups))]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[2:], float))


def _means(values: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """The mean over each group and over all tasks; NaN where a task of it is missing."""
    means = metrics.group_means({task: values.get(task, math.nan) for task in groups}, groups)
    return {f"mean_{group}": means[group] for group in _mean_groups(groups)}


def _mean_groups(groups: Mapping[str, str]) -> list[str]:
    """The groups that have a mean of their own, and "all"; of a single group the mean is that of all."""
    found = [group for group in GROUPS if group in groups.values()]
    return [*found, ALL] if len(found) > 1 else [ALL]


def _titled(data: pd.DataFrame, shown: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Finished cells under two levels of headers: the group, then the task or mean."""
    groups = tasks_in_order(results)
    headers = [
        (MEAN, column.removeprefix("mean_").capitalize())
        if column.startswith("mean_")
        else (groups[column].capitalize(), task_title(column))
        for column in map(str, shown)
    ]
    display = shown.set_axis(pd.MultiIndex.from_tuples(headers), axis="columns")
    display.insert(0, ("", "Method"), data["method"].map(method_title))
    return with_backbone(data, display)


def _best(data: pd.DataFrame, shown: pd.DataFrame) -> frozenset[tuple[int, int]]:
    """Cells that equal the best of their backbone's column as shown."""
    first = 2 if data["backbone"].nunique() > 1 else 1
    best = set()
    for column, name in enumerate(shown):
        numbers = pd.to_numeric(shown[name], errors="coerce")
        top = numbers.groupby(data["backbone"]).transform("max")
        best |= {(row, column + first) for row, is_top in enumerate(numbers == top) if is_top}
    return frozenset(best)


def with_backbone(data: pd.DataFrame, display: pd.DataFrame) -> pd.DataFrame:
    """``display`` with a first column for the backbone, where there are several."""
    if data["backbone"].nunique() > 1:
        header = ("", "Backbone") if display.columns.nlevels > 1 else "Backbone"
        display.insert(0, header, data["backbone"])
    return display


def integer(value: float) -> str:
    """A whole number with thousands set apart; an en dash for NaN."""
    return MISSING if math.isnan(value) else f"{int(value):,}"


def number(value: float) -> str:
    """A number at its shortest; an en dash for NaN."""
    return MISSING if math.isnan(value) else f"{value:g}"


def _count(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:,.1f}".removesuffix(".0")
