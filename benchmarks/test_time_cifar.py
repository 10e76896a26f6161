"""Accuracy of a CIFAR-10 network under fifteen corruptions, with test-time batch statistics of several kinds.

    OMP_NUM_THREADS=1 python benchmarks/test_time_cifar.py [--images 400] [--severity 5]
                                                          [--out benchmarks/records/test-time-cifar.json]

The network is that of the task `cifar-cnn` (`laconic fetch cifar-cnn cifar10`): six convolutions with batch norms, the
last of which sees one place an image. The images are the first so many of each class among the 10,000 of the test. They
come in two orders, drawn at random or sorted by label, and in batches of 1, 8 and 64. Compared are

    source      the statistics of the training
    BN-adapt    those of the batch alone: alpha-BN with source_weight 0
    alpha-BN    nine tenths of the training's, one tenth of the batch's
    UnMix-TNS   sixteen components, reset before every corruption

Every method sees the same corrupted images. Prints a table and writes a JSON record with the machine and every accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from laconic.adapt import AlphaBN, UnMixTNS
from laconic.core.test_time import Attached
from laconic.norm import CORRUPTIONS, Corruption
from laconic.pipeline.measure import machine, versions
from laconic.tasks import load_task
from laconic.tasks.cifar_cnn import load_model

METHODS = ("source", "BN-adapt", "alpha-BN", "UnMix-TNS")
BATCHES, ORDERS = (1, 8, 64), ("iid", "sorted")
SHARE = 0.9  # source_weight of alpha-BN
SOURCE_BATCH = 100


def chosen(labels: Tensor, images: int) -> Tensor:
    """Indices of the first images of each class, as many of each, by class."""
    classes = int(labels.max()) + 1
    return torch.cat([torch.nonzero(labels == c).flatten()[: images // classes] for c in range(classes)])


def attached(method: str, model: nn.Module, batch: int) -> Attached:
    """A method's layers in the model."""
    if method == "UnMix-TNS":
        return UnMixTNS.attach(model, batch_size=batch)
    return AlphaBN.attach(model, source_weight={"source": 1.0, "BN-adapt": 0.0, "alpha-BN": SHARE}[method])


def accuracy(stream: Attached, images: Tensor, labels: Tensor, batch: int) -> float:
    """Of a stream from its beginning."""
    stream.reset()
    answers = torch.cat([stream.update(part).argmax(1) for part in images.split(batch)])
    return float((answers == labels).double().mean())


def conditions() -> list[tuple[str, int, str]]:
    """(method, batch, order) of every run. The source looks at no batch, and a batch of one has no order without state."""
    runs = [("source", SOURCE_BATCH, "iid")]
    for method in METHODS[1:]:
        for batch in BATCHES:
            for order in ORDERS:
                if method == "UnMix-TNS" or batch > 1 or order == "iid":
                    runs.append((method, batch, order))
    return runs


def main() -> None:
    """Run every condition and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="how many of the test images")
    parser.add_argument("--severity", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON record")
    options = parser.parse_args()
    began, cpu = time.perf_counter(), time.process_time()
    model, _ = load_model()
    task = load_task("cifar-cnn")
    images, labels = task.inputs["verify"][0], torch.from_numpy(task.labels["verify"])
    by_class = chosen(labels, options.images)
    images, labels = images[by_class], labels[by_class]
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(options.seed))
    orders = {"iid": shuffled, "sorted": torch.arange(len(labels))}
    changed = {"clean": images}
    for number, name in enumerate(CORRUPTIONS):
        corruption = Corruption(name, options.severity, value_range=model.input_range)
        changed[name] = corruption.from_seeds(images, [10_000 * number + int(i) for i in by_class])
    rows: list[dict[str, Any]] = []
    for method, batch, order in conditions():
        with attached(method, model, batch) as stream:
            place = orders[order]
            found = {name: accuracy(stream, x[place], labels[place], batch) for name, x in changed.items()}
        mean = sum(found[name] for name in CORRUPTIONS) / len(CORRUPTIONS)
        rows.append({"method": method, "batch": batch, "order": order, "mean": mean, "accuracy": found})
        print(
            f"{method:>9}  batch {batch:>3}  {order:>6}  clean {100 * found['clean']:5.1f}  corrupted {100 * mean:5.1f}",
            flush=True,
        )
    record = {
        "command": " ".join(["python", *sys.argv]), "images": len(labels), "severity": options.severity,
        "seed": options.seed, "source_weight": SHARE, "rows": rows, "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu, "threads": torch.get_num_threads(), "machine": machine(),
        "versions": versions(),
    }  # fmt: skip
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
