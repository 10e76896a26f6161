"""The claim of `spectral_norm`: eight Gaussians on a ring, learned by a GAN at a high learning rate.

Both arms have the same generator and discriminator, hinge loss, and Adam at ten times the paper's rate. There is no
classification in it, and two networks step in turn, so the loop is its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.weight import spectral_norm

MODES, RADIUS, DEVIATION = 8, 2.0, 0.1
LR, BETAS = 2e-3, (0.5, 0.999)
BATCH, STEPS, HIDDEN, LATENT = 128, 1000, 64, 4
SAMPLES = 2000
# A mode counts where at least this share of the samples lies within three deviations of its centre.
SHARE, REACH = 0.02, 3 * DEVIATION


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Modes that the generator covers after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, discriminator = perceptron(LATENT, 2), perceptron(2, 1)
        if arm == "spectral_norm":
            for layer in discriminator:
                if isinstance(layer, nn.Linear):
                    spectral_norm(layer)
        train(generator, discriminator, 20 if quick else STEPS)
        with torch.no_grad():
            return covered(generator(torch.randn(SAMPLES, LATENT)))


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    hidden = [nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, outputs))


def centres() -> Tensor:
    """(MODES, 2)."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack((angle.cos(), angle.sin()), dim=1)


def train(generator: nn.Module, discriminator: nn.Module, steps: int) -> None:
    """A step of the discriminator, a step of the generator, in turn."""
    of_generator = torch.optim.Adam(generator.parameters(), LR, BETAS)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), LR, BETAS)
    modes = centres()
    for _ in range(steps):
        real = modes[torch.randint(MODES, (BATCH,))] + DEVIATION * torch.randn(BATCH, 2)
        fake = generator(torch.randn(BATCH, LATENT))
        loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake.detach())).mean()
        of_discriminator.zero_grad()
        loss.backward()
        of_discriminator.step()
        of_generator.zero_grad()
        (-discriminator(fake).mean()).backward()
        of_generator.step()


def covered(samples: Tensor) -> float:
    """How many modes have their share of samples; none where they are not numbers."""
    near = torch.cdist(samples, centres()) < REACH
    return float((near.float().mean(0) >= SHARE).sum())
