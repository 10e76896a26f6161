"""The claim of `adab2n`: digits learned two by two, once over, with 100 of the earlier ones to replay.

Every step takes ten new images and, from the second task on, ten from a reservoir of those seen. Both arms are the same
network with plain cross-entropy and SGD; "adab2n" weighs batches by task, adapts the momentum (kappa 0.4) and ties the
batch's statistics to those that are kept (0.1), values of the middle of the paper's grids.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn import functional as F

from laconic.adapt import AdaB2NContext
from laconic.tasks.small import small

TASKS, PER_TASK, RESERVOIR, BATCH = 5, 800, 100, 10
RATE, KAPPA, WEIGHT = 0.05, 0.4, 0.1


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Mean over tasks of the accuracy at the end; `quick` tests the code and shows nothing."""
    task = small("mnist-cnn", seed=seed, size=400 if quick else None)
    model = task.model(seed)
    context = AdaB2NContext(model, TASKS, kappa=KAPPA) if arm == "adab2n" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    images, labels = task.train_data().columns
    kept_images, kept_labels, seen = images[:0], labels[:0], 0
    model.train()
    for number in range(TASKS):
        mine = torch.nonzero(labels // 2 == number).flatten()
        mine = mine[torch.randperm(len(mine), generator=generator)][: 20 if quick else PER_TASK]
        for part in mine.split(BATCH):
            x, y = images[part], labels[part]
            if number and len(kept_labels):
                drawn = torch.randint(len(kept_labels), (BATCH,), generator=generator)
                x, y = torch.cat([x, kept_images[drawn]]), torch.cat([y, kept_labels[drawn]])
            optimizer.zero_grad()
            with context.batch(y // 2) if context else nullcontext():
                loss = F.cross_entropy(model(x), y)
            if context:
                loss = loss + WEIGHT * context.stat_loss()
            loss.backward()
            optimizer.step()
            for i in part.tolist():  # reservoir sampling: each seen so far is kept with the same chance
                seen += 1
                if len(kept_labels) < RESERVOIR:
                    kept_images = torch.cat([kept_images, images[i : i + 1]])
                    kept_labels = torch.cat([kept_labels, labels[i : i + 1]])
                elif (place := int(torch.randint(seen, (), generator=generator))) < RESERVOIR:
                    kept_images[place], kept_labels[place] = images[i], labels[i]
        if context and number + 1 < TASKS:
            context.end_task()
    model.eval()
    test_images, test_labels = task.data["test"].columns
    with torch.no_grad():
        hits = (model(test_images).argmax(1) == test_labels).double()
    return float(torch.stack([hits[test_labels // 2 == number].mean() for number in range(TASKS)]).mean())
