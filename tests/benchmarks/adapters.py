"""Adapters of a finished demo: what predicting with them computes, takes and needs on disk.

    python -m tests.benchmarks.adapters RUN_DIRECTORY [--images 1000]

Per task: the share of a whole forward pass (operations, wall time) that the head's taps need; wall time
beside a pass that pools every tap; all adapters in one pass beside one after the other; bytes beside the cost
model (`h2t.costs`); test accuracy with weights of fewer bytes.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from h2t.adapter import Adapter, convert_head
from h2t.backbones.tap_reader import TapReader
from h2t.costs import HeadSize, measure_backbone, storage_bytes
from h2t.head2toe import Head
from h2t.images.formats import open_source
from h2t.images.preprocessing import prepare, to_batch
from h2t.shared_pass import SharedPass
from h2t.tasks import demo_task

WEIGHTS = ("float32", "float16", "int8")
ROUNDS = 5


def flops(function: Callable[[], object]) -> int:
    """Operations of the products and convolutions of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def seconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median wall time of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: median(values[1:]) for name, values in times.items()}


def head_of(adapter: Adapter) -> Head:
    assert isinstance(adapter.head, Head)
    return adapter.head


def task_row(task: str, file: Path, n_images: int) -> dict[str, object]:
    """The figures of one adapter."""
    adapter = Adapter.load(file)
    head, backbone = head_of(adapter), adapter.backbone
    source = open_source("bundled", demo_task(task), None, {"n_test": 1000})
    batch = to_batch(
        [prepare(image, adapter.preprocessing) for image in source.read("test", range(50))],
        adapter.preprocessing,
    )
    needed = SharedPass(backbone, [head])
    with TapReader(backbone, [head.hyperparameters.target_size]) as every, torch.inference_mode():
        share = flops(lambda: needed(batch)) / flops(lambda: backbone.model(batch))
        times = seconds(
            {
                "needed": lambda: needed(batch),
                "every tap": lambda: every(batch),
                "bare": lambda: backbone.model(batch),
            }
        )
    size = HeadSize(head.layout.n_features, len(head.kept), head.n_classes)
    model = storage_bytes("head2toe", measure_backbone(backbone), size)
    row: dict[str, object] = {
        "task": task,
        "kept": len(head.kept),
        "taps": len(head.taps_read()),
        "last tap": head.taps_read()[-1],
        "operations": share,
        "time of the bare pass": times["needed"] / times["bare"],
        "time of every tap": times["needed"] / times["every tap"],
        "bytes": file.stat().st_size,
        "of the cost model": file.stat().st_size / model,
    }
    images, labels = source.read("test", range(n_images)), source.labels("test")[:n_images]
    for kind in WEIGHTS:
        sink = io.BytesIO()
        convert_head(file, sink, kind)  # type: ignore[arg-type]
        prediction = Adapter.load(sink.getvalue())._logits(images, 50).argmax(1)
        row[kind] = 100 * float((prediction == labels).mean())
    return row


def together(files: list[Path]) -> dict[str, object]:
    """All adapters in one forward pass beside one after the other."""
    adapters = [Adapter.load(file) for file in files]
    first = adapters[0]
    size = first.backbone.image_size
    batch = torch.randn(50, 3, size, size)
    heads = [head_of(adapter) for adapter in adapters]
    alone = [SharedPass(adapter.backbone, [head]) for adapter, head in zip(adapters, heads, strict=True)]
    shared = SharedPass(first.backbone, heads)
    with torch.inference_mode():
        times = seconds({"together": lambda: shared(batch), "apart": lambda: [one(batch) for one in alone]})
        pairs = zip(shared(batch), [one(batch)[0] for one in alone], strict=True)
        difference = max(float((first - second).abs().max()) for first, second in pairs)
    return {
        "adapters": len(files),
        "times as fast": times["apart"] / times["together"],
        "difference": difference,
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_directory")
    parser.add_argument("--images", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    files = {
        file.parts[-3]: file
        for file in sorted(Path(given.run_directory, "heads").glob("*/*/frozen/head2toe-seed-0-*"))
    }
    rows = [task_row(task, file, given.images) for task, file in files.items()]
    print(tabulate(rows, headers="keys", floatfmt=".4g"), flush=True)
    print(tabulate([together([*files.values()])], headers="keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
