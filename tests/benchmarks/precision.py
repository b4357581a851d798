"""What bfloat16 in the backbone changes: features, the features that are kept, and accuracy.

    python -m tests.benchmarks.precision [--tasks mnist dsprites_loc] [--images 1000]

The demo's backbone and images, once in float32 and once in bfloat16; the same heads are trained on both.
"""

import time
from argparse import ArgumentParser

import numpy as np
from tabulate import tabulate

from h2t.backbones.loading import load_backbone
from h2t.backbones.tap_reader import feature_layout
from h2t.device import slow_in_bfloat16
from h2t.extraction import extract_features
from h2t.features import FeatureLayout
from h2t.head2toe import Head, fit, logits
from h2t.hyperparameters import Hyperparameters
from h2t.images.formats import open_source
from h2t.metrics import accuracy
from h2t.tasks import demo_task

TARGET_SIZE = 512
POINTS = [
    Hyperparameters("linear", TARGET_SIZE, 0.01, 500),
    *(Hyperparameters("head2toe", TARGET_SIZE, 0.01, 500, 1e-5, fraction) for fraction in (0.01, 0.1)),
]


class Extracted:
    """Features of the first images of both splits of a task, float32 [n, n_features], by one precision."""

    def __init__(self, task: str, n_images: int, precision: str) -> None:
        backbone = load_backbone("efficientnet_lite0", image_size=128, precision=precision)
        source = open_source("bundled", demo_task(task), None, {"n_train": n_images, "n_test": n_images})
        self.layout = feature_layout(backbone, TARGET_SIZE)
        self.features, self.labels = {}, {}
        started = time.process_time()
        for split in ("train", "test"):
            self.labels[split] = source.labels(split)
            images = source.read(split, range(n_images))
            self.features[split] = extract_features(backbone, images, TARGET_SIZE)
        self.seconds = time.process_time() - started

    def heads(self) -> list[Head]:
        n_classes = int(self.labels["train"].max()) + 1
        options = {"n_classes": n_classes, "embedding": "pre_logits"}
        fitted = fit(self.features["train"], self.labels["train"], self.layout, POINTS, **options)
        by_point = {head.hyperparameters: head for head in fitted}
        return [by_point[point] for point in POINTS]

    def test_accuracy(self, head: Head) -> float:
        return accuracy(self.labels["test"], logits(head, self.features["test"]).argmax(1))


def relative_change(full: np.ndarray, half: np.ndarray, layout: FeatureLayout) -> list[float]:
    """Of each tap: norm of the difference over norm of the features."""
    return [
        float(np.linalg.norm(half[:, span] - full[:, span]) / np.linalg.norm(full[:, span]))
        for span in layout.slices
    ]


def main() -> None:
    """Print a table per task."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["mnist", "dsprites_loc"])
    parser.add_argument("--images", type=int, default=1000)
    given = parser.parse_args()
    if slow_in_bfloat16():
        parser.exit(message="skipped: this processor has no products in bfloat16\n")
    for task in given.tasks:
        full, half = (Extracted(task, given.images, precision) for precision in ("float32", "bfloat16"))
        changes = relative_change(full.features["test"], half.features["test"], full.layout)
        print(f"\n{task}: features change by {np.median(changes):.3g} (median of the taps), "
              f"{max(changes):.3g} (largest); bfloat16 takes {half.seconds / full.seconds:.2g} times "
              "the processor time of float32")  # fmt: skip
        rows = []
        for a, b in zip(full.heads(), half.heads(), strict=True):
            rows.append(
                {
                    "method": a.hyperparameters.method,
                    "F": a.hyperparameters.keep_fraction,
                    "same kept features": len(np.intersect1d(a.kept, b.kept)) / len(a.kept),
                    "test accuracy, float32": full.test_accuracy(a),
                    "bfloat16": half.test_accuracy(b),
                }
            )
        print(tabulate(rows, headers="keys", floatfmt=".3g"), flush=True)


if __name__ == "__main__":
    main()
