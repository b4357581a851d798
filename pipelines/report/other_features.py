"""The section of a study of other features: the same method on runs with other taps or class tokens."""

from collections.abc import Mapping

import pandas as pd

from h2t import paper
from h2t.statistics import accuracy_estimate, paired_difference
from pipelines.report.frames import Frames, model_name
from pipelines.report.studies import Section
from pipelines.report.tables import (
    in_paper_order,
    medians,
    signed,
    tasks_in_order,
)
from pipelines.report.trained import interval_figures, variant_table

ORIGINAL, METHOD = "original", "head2toe"


def section_of_features(
    frames: Frames,
    study: str,
    title: str,
    position: int,
    note: str,
    titles: Mapping[str, str],
    published: str,
) -> Section | None:
    """Head2Toe with the recipe's own features and with each variant of them; None where none has run.

    ``published``: the table of ``paper.variant_means`` and its backbone, as ``table6 resnet50``.
    """
    rows = variant_rows_of_recipes(frames, study)
    if rows.empty:
        return None
    others = rows[rows["variant"] != ORIGINAL]
    means = others.groupby("variant", sort=False)["difference"].mean()
    best = str(means.idxmax())
    words = (
        f"The best other variant, {titles[best].lower()}, changes the accuracy of Head2Toe by "
        f"{signed(means[best])} points in the mean over {others['task'].nunique()} tasks."
    )
    table_name, _, backbone = published.partition(" ")
    if any(model_name(name) == backbone for name in rows["backbone"]):
        note += " " + _beside_paper(table_name, titles)
    names = {name: titles.get(name, name) for name in rows["variant"]}
    table = variant_table(study, title, note, rows, names.__getitem__)
    caption = "Test accuracy of Head2Toe, percent, with its 95 % interval"
    figures = interval_figures(frames, rows, study, caption, "Features", names.__getitem__)
    return Section(study, title, position, words, (table,), figures, folded=True)


def variant_rows_of_recipes(frames: Frames, study: str) -> pd.DataFrame:
    """A row per backbone, task and variant, with the columns of ``trained.variant_rows`` in use."""
    runs = {variant: part for (name, variant), part in frames.recipes.items() if name == study}
    rows = []
    for position, (variant, run) in enumerate([(ORIGINAL, frames), *runs.items()] if runs else []):
        for backbone in run.finished["backbone"].unique():
            groups = tasks_in_order(run.finished[run.finished["backbone"] == backbone])
            for task, accuracy in medians(run.finished, backbone, METHOD).items():
                row = {
                    "backbone": backbone, "task": task, "group": groups[task], "variant": variant,
                    "series": variant, "x": position, "accuracy": accuracy, "n_kept": 0,
                }  # fmt: skip
                rows.append(row | _sureness(frames, run, (backbone, task), variant))
    data = pd.DataFrame(rows)
    return in_paper_order(data.assign(method=METHOD), ["backbone", "task", "x"]) if rows else data


def _sureness(frames: Frames, run: Frames, key: tuple[str, str], variant: str) -> dict[str, float]:
    """The interval of an accuracy and of its difference to the original, where predictions say them."""
    nothing = dict.fromkeys(["low", "high", "difference", "difference_low", "difference_high"], float("nan"))
    right = run.correctness.get(key, {}).get(METHOD)
    if right is None:
        return nothing
    estimate = accuracy_estimate(right)
    found = nothing | {"low": estimate.low, "high": estimate.high}
    original = frames.correctness.get(key, {}).get(METHOD)
    if variant == ORIGINAL or original is None or original.shape[1] != right.shape[1]:
        return found
    change = paired_difference(right, original)
    return found | {
        "difference": change.mean, "difference_low": change.low, "difference_high": change.high
    }  # fmt: skip


def _beside_paper(table: str, titles: Mapping[str, str]) -> str:
    means = paper.variant_means(table)
    shown = ", ".join(f"{titles.get(name, name).lower()} {row['all']:.1f}" for name, row in means.items())
    return f"The paper's means over VTAB-1k: {shown}."
