"""Figures 4, 8 (right) and 9: what one more tap beside the embedding gains."""

import math

import pandas as pd

from h2t import metrics, paper
from pipelines.report.figures import PALETTE, ReportFigure, draw, figure_name, heat, lines
from pipelines.report.frames import Frames, model_name
from pipelines.report.studies import Section
from pipelines.report.studies.affinity import affinities
from pipelines.report.tables import (
    ReportTable,
    by_backbone,
    medians,
    percent,
    signed,
    task_title,
    with_backbone,
)
from pipelines.report.trained import IN_TABLE, points, variant_rows, variant_table

NAME, TITLE = "single-tap", "The embedding and one more tap"
ALONE = "embedding alone"  # the variant that the others are compared with
NOTE = (
    "Test accuracy of a linear head on the embedding and one more tap, every tap in turn, hyperparameters by "
    "cross-validation; reference: the embedding alone."
)
ORACLE_NOTE = (
    "The oracle is the tap that is best on the test images themselves, task by task: a bound, not a method. "
    "Control: the embeddings of two networks, where the study of that name was run."
)


def section(frames: Frames) -> Section | None:
    """Accuracies, the oracle, and the correlation of each tap's gain with domain affinity."""
    rows = variant_rows(frames, NAME)
    if rows.empty:
        return None
    best = with_control(oracle(rows), frames)
    tables = [
        _oracle_table(best),
        variant_table(NAME, TITLE, NOTE, rows, header="Tap"),
    ]
    ranks = tap_correlations(rows, affinities(frames.finished))
    if len(ranks):
        tables.append(_correlation_table(ranks))
    figures = [
        figure
        for backbone, part in by_backbone(rows).items()
        for figure in (_panels(part, backbone, frames.backbones), _heat(part, backbone, frames.backbones))
    ]
    gain = best["gain"].mean()
    most = best.to_dict("records")[int(best["gain"].argmax())]
    words = (
        f"With the best tap beside it (an oracle), the embedding gains {signed(gain)} points in the mean "
        f"over {len(best)} tasks, most on {task_title(most['task'])} ({signed(most['gain'])}, tap "
        f"{most['tap']})."
    )
    return Section(NAME, TITLE, 110, words, tuple(tables), tuple(figures), folded=True)


def oracle(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per backbone and task: the embedding alone, the best tap beside it, and the gain."""
    found = []
    for (backbone, task, group), part in rows.groupby(["backbone", "task", "group"], sort=False):
        by_variant = {str(k): float(v) for k, v in part.set_index("variant")["accuracy"].items()}
        alone = by_variant.pop(ALONE)
        tap = max(by_variant, key=lambda variant: by_variant[variant])
        found.append((backbone, task, group, alone, tap, by_variant[tap], by_variant[tap] - alone))
    return pd.DataFrame(found, columns=["backbone", "task", "group", "alone", "tap", "oracle", "gain"])


def with_control(best: pd.DataFrame, frames: Frames) -> pd.DataFrame:
    """The oracle's rows with the accuracy of both networks' embeddings, NaN where that was not run."""
    results = frames.recipes.get(("control", "second"), Frames()).finished
    known = {name: medians(results, name, "all") for name in results["backbone"].unique()}
    keys = zip(best["backbone"], best["task"], strict=True)
    return best.assign(control=[known.get(backbone, {}).get(task, math.nan) for backbone, task in keys])


def tap_correlations(rows: pd.DataFrame, affinity: pd.DataFrame) -> pd.DataFrame:
    """Figure 8, right: Spearman's correlation over tasks of a tap's relative gain with domain affinity."""
    known = {(r["backbone"], r["task"]): r["affinity"] for r in affinity.to_dict("records")}
    alone = {
        (r["backbone"], r["task"]): r["accuracy"] for r in rows[rows["variant"] == ALONE].to_dict("records")
    }
    found = []
    taps = rows[rows["variant"] != ALONE].groupby(["backbone", "variant"], sort=False)
    for (backbone, tap), part in taps:
        pairs = [
            (known[key], row["accuracy"] / alone[key] - 1)
            for row in part.to_dict("records")
            if (key := (backbone, row["task"])) in known and alone[key] > 0
        ]
        rank = metrics.spearman(*map(list, zip(*pairs, strict=True))) if len(pairs) > 2 else math.nan
        if not math.isnan(rank):
            found.append((backbone, tap, part["x"].iloc[0], rank, len(pairs)))
    return pd.DataFrame(found, columns=["backbone", "tap", "tap_index", "correlation", "n_tasks"])


def _oracle_table(best: pd.DataFrame) -> ReportTable:
    display = pd.DataFrame(
        {
            "Task": best["task"].map(task_title),
            "Embedding": best["alone"].map(percent),
            "Oracle": best["oracle"].map(percent),
            "Gain": best["gain"].map(signed),
            "Tap": best["tap"],
            **({"Control": best["control"].map(percent)} if best["control"].notna().any() else {}),
        }
    )
    note = ORACLE_NOTE
    if any(model_name(backbone) == "resnet50" for backbone in best["backbone"]):
        printed = paper.variant_means("figure4")
        note += (
            " The paper's means over VTAB-1k with ResNet-50: "
            + ", ".join(f"{name} {means['all']:.1f}" for name, means in printed.items())
            + " (control: the embedding of a second network)."
        )
    return ReportTable(
        "single-tap-oracle", "The best tap of each task", note, best, with_backbone(best, display)
    )


def _correlation_table(ranks: pd.DataFrame) -> ReportTable:
    display = pd.DataFrame({"Tap": ranks["tap"], "Correlation": ranks["correlation"].map("{:.2f}".format)})
    return ReportTable(
        "single-tap-affinity", "Gain of each tap and domain affinity",
        "Spearman's correlation over tasks of the relative gain over the embedding with domain affinity. The "
        "paper's for the oracle is −0.75.",
        ranks, with_backbone(ranks, display),
    )  # fmt: skip


def _panels(rows: pd.DataFrame, backbone: str, backbones: list[str]) -> ReportFigure:
    """Accuracy against the tap, in network order, a panel per task; the embedding alone as the other line."""
    alone = rows[rows["variant"] == ALONE].set_index("task")["accuracy"]
    taps = rows[rows["variant"] != ALONE]
    shown = [
        (task_title(row["task"]), row["variant"], int(row["x"]), points(value), name)
        for row in taps.to_dict("records")
        for name, value in (("with the tap", row["accuracy"]), (ALONE, alone[row["task"]]))
    ]
    data = pd.DataFrame(shown, columns=["Task", "Tap", "Position", "Accuracy", "Head"])
    colours = {"with the tap": (PALETTE[0], "circle"), ALONE: (PALETTE[6], "square")}
    return draw(
        figure_name("single-tap", backbone, backbones),
        f"Test accuracy, percent, of the embedding of {backbone} with one more tap, from input to output.",
        IN_TABLE,
        lines(data, x="Position", y="Accuracy", series="Head", colours=colours, panel="Task", points=False),
        data,
    )


def _heat(rows: pd.DataFrame, backbone: str, backbones: list[str]) -> ReportFigure:
    alone = rows[rows["variant"] == ALONE].set_index("task")["accuracy"]
    taps = rows[rows["variant"] != ALONE]
    data = pd.DataFrame(
        {
            "Task": taps["task"].map(task_title),
            "Tap": taps["variant"],
            "Gain": (100 * (taps["accuracy"] - taps["task"].map(alone))).round(2),
            "Accuracy": (100 * taps["accuracy"]).round(2),
        }
    )
    return draw(
        figure_name("single-tap-gain", backbone, backbones),
        f"Gain of each tap over the embedding of {backbone} alone, in points of percent.",
        IN_TABLE,
        heat(data, row="Task", column="Tap", value="Gain", diverging=True),
        data,
    )
