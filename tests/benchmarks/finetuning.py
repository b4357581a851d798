"""Images per second of the training step against a plain PyTorch loop of the same model, batch and threads.

    python -m tests.benchmarks.finetuning

Both take turns, six steps each, so that what else the machine does falls on both; the ratio is of medians.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from h2t.backbones.loading import load_backbone
from h2t.finetuning import FinetuneOptions, TrainableModel, embedding_features, train
from h2t.images.preprocessing import Preprocessing, to_batch

ROUNDS, STEPS, BATCH = 4, 6, 32
CASES = (("efficientnet_lite0", 64), ("resnet18", 64), ("test_vit", 160))


def plain_step(name: str, size: int, images: list[np.ndarray], labels: np.ndarray) -> Callable[[], None]:
    """A step of a loop as one would write it: a timm model with its own classifier."""
    model = load_backbone(name, weights="random", image_size=size).model.requires_grad_(True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch, truth = to_batch(images, Preprocessing(size)), torch.from_numpy(labels)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), truth).backward()
        optimizer.step()

    return step


def our_steps(name: str, size: int, images: list[np.ndarray], labels: np.ndarray) -> Callable[[], None]:
    """A training of ``STEPS`` steps, with making its optimizer and preparing the images."""
    backbone = load_backbone(name, weights="random", image_size=size)
    model = TrainableModel(
        backbone, embedding_features(backbone), 16, options=FinetuneOptions(batch_size=BATCH)
    )

    def steps() -> None:
        train(model, images, labels, Preprocessing(size), learning_rate=0.01, steps=STEPS)

    return steps


def main() -> None:
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    labels = np.arange(BATCH) % 16
    print(f"{'backbone':<20} {'px':>4} {'plain img/s':>12} {'ours img/s':>12} {'ratio':>6}")
    for name, size in CASES:
        images = list(generator.integers(0, 256, (BATCH, size, size, 3), np.uint8))
        ours, plain = our_steps(name, size, images, labels), plain_step(name, size, images, labels)
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        for number in range(ROUNDS + 1):
            for key, steps in (("ours", [ours]), ("plain", [plain] * STEPS)):
                started = time.perf_counter()
                for step in steps:
                    step()
                if number:
                    seconds[key].append((time.perf_counter() - started) / STEPS)
        rates = {key: BATCH / statistics.median(values) for key, values in seconds.items()}
        ratio = rates["ours"] / rates["plain"]
        print(f"{name:<20} {size:>4} {rates['plain']:>12.1f} {rates['ours']:>12.1f} {ratio:>6.2f}")


if __name__ == "__main__":
    main()
