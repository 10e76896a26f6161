"""The claim of `kd_toolbox`: a student of 16 hidden units, with and without a teacher of 3 x 512.

Both arms train the same student on the same 1,000 images and labels, in the same order, for as many steps. In the arm
"teacher" its loss is 0.1 of the labels' and 0.9 of the softened outputs' at T = 4. The teacher, too, has seen these
images alone.
"""

from __future__ import annotations

import torch

from laconic.distill import Distill, KDLoss, Match
from laconic.tasks.small import small
from laconic.tasks.small.networks import mlp

IMAGES, TEACHER_EPOCHS, STUDENT_EPOCHS = 1000, 10, 40


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Test accuracy of the student from one seed; `quick` tests the code and shows nothing."""
    task = small("mnist-mlp", seed=seed, size=100 if quick else IMAGES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student, teacher = mlp(784, (16,), 10), mlp(784, (512, 512, 512), 10)
    hooks = []
    if arm == "teacher":
        task.train(teacher, seed, epochs=1 if quick else TEACHER_EPOCHS)
        hooks = [Distill(teacher, [Match(KDLoss(T=4.0, alpha=1.0), weight=0.9)], task_weight=0.1)]
    task.train(student, seed, epochs=1 if quick else STUDENT_EPOCHS, hooks=hooks)
    return task.evaluate(student).value
