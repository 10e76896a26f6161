"""Train the baseline network of small tasks over some seeds: the figures that `Baseline.value` and `spread` state.

    python experiments/baselines.py [NAME ...] [--seeds 5]

Without names it trains one task of each kind. Prints, per task, the mean of the metric on the test rows, the farthest
seed, the metric of an untrained network, and what a training took.
"""

from __future__ import annotations

import argparse
import time

from laconic.tasks.small import small

NAMES = (
    "digits",
    "mnist-mlp",
    "mnist-cnn",
    "cifar-small",
    "spam",
    "bbc",
    "chars",
    "table-magic",
    "karate",
    "kg-nations",
)


def main() -> None:
    """Run the trainings and print a line for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print(f"{'task':<14} {'metric':<22} {'mean':>7} {'spread':>7} {'untrained':>9} {'CPU s':>6} {'parameters':>11}")
    for name in options.names:
        values, seconds = [], 0.0
        for seed in range(options.seeds):
            task = small(name, seed=seed)
            model = task.model(seed)
            untrained = task.evaluate(model).value
            start = time.process_time()
            task.train(model, seed)
            seconds += (time.process_time() - start) / options.seeds
            values.append(task.evaluate(model).value)
        mean = sum(values) / len(values)
        spread = max(abs(value - mean) for value in values)
        parameters = sum(p.numel() for p in model.parameters())
        numbers = f"{mean:7.4f} {spread:7.4f} {untrained:9.4f} {seconds:6.1f} {parameters:11,}"
        print(f"{name:<14} {task.metric.name:<22} {numbers}", flush=True)


if __name__ == "__main__":
    main()
