"""The paper's printed tables, for a comparison side by side.

Tasks go by the titles of the paper's columns, backbones and methods by this package's names. Accuracies are
in percent with one decimal, as printed.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from h2t import metrics
from h2t.hyperparameters import Hyperparameters

BACKBONES = {"resnet50": "ResNet-50", "vitb16": "ViT-B/16"}


@cache
def published() -> dict[str, Any]:
    """All the figures, as stored in ``published_tables.json``; not to be changed by the caller."""
    return json.loads(files("h2t").joinpath("published_tables.json").read_text(encoding="utf-8"))


def task_titles() -> tuple[str, ...]:
    """The 19 columns of Table 1, in its order."""
    return tuple(published()["tasks"])


def accuracies(backbone: str, method: str) -> dict[str, float]:
    """A row of Table 1: task title -> median test accuracy over 3 seeds in percent; empty if unpublished."""
    return _row("table1", backbone, method)


def deviations(backbone: str, method: str) -> dict[str, float]:
    """A row of Table 4: task title -> standard deviation over 3 seeds, in percent; empty if not published."""
    return _row("table4", backbone, method)


def hyperparameters(backbone: str) -> dict[str, Hyperparameters]:
    """Table 2: task title -> what was chosen for Head2Toe; empty if not published for ``backbone``."""
    rows = published()["table2"].get(backbone, [])
    return {
        title: Hyperparameters("head2toe", target_size, rate, steps, coefficient, fraction)
        for title, (target_size, fraction, rate, steps, coefficient) in zip(task_titles(), rows, strict=False)
    }


def domain_affinity(backbone: str) -> dict[str, float]:
    """Task title -> linear minus scratch of Table 1, in points of percent, lowest first."""
    return metrics.domain_affinity(accuracies(backbone, "linear"), accuracies(backbone, "scratch"))


def gain_correlation(backbone: str) -> float:
    """Spearman's correlation of domain affinity and Head2Toe's gain over linear, from Table 1.

    Figure 2 shows the two. Section 3.2 has -0.745 for another gain: of the best single layer beside the
    embedding, which is not published by task.
    """
    linear, head2toe = accuracies(backbone, "linear"), accuracies(backbone, "head2toe")
    affinity = domain_affinity(backbone)
    return metrics.spearman(list(affinity.values()), [head2toe[title] - linear[title] for title in affinity])


def affinity_correlation() -> float:
    """Spearman's correlation of the two backbones' domain affinities, from Table 1: 0.868.

    Section 2 and Appendix F have 0.907. Rounding is not the reason: it changes the order of no two tasks.
    """
    resnet, vit = domain_affinity("resnet50"), domain_affinity("vitb16")
    return metrics.spearman(list(resnet.values()), [vit[title] for title in resnet])


def corrected(percent: float, n_test: int) -> float:
    """The exact accuracy behind a printed one of ``n_test`` images, in percent.

    The authors' evaluation counts a short last batch of 50 as full; this undoes it.
    """
    return percent * metrics.padded_size(n_test) / n_test


def variant_means(table: str) -> dict[str, dict[str, float]]:
    """ "figure4" (right), "table6" or "table7": variant -> "all" or group -> mean accuracy in percent.

    Variants go by this package's names. Figure 4 and Table 6 are with ResNet-50, Table 7 with ViT-B/16.
    """
    columns = published()["group_means_columns"]
    rows = published()[table].items()
    return {variant: dict(zip(columns, values, strict=True)) for variant, values in rows}


def _row(table: str, backbone: str, method: str) -> dict[str, float]:
    row = published()[table].get(backbone, {}).get(method)
    return dict(zip(task_titles(), row["values"], strict=True)) if row else {}
