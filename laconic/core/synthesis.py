"""Calibration data out of the model itself: inputs whose statistics are those that its batch norms remember, or text.

Pictures. For a batch norm l that remembers mean mu (C,) and variance var (C,), and has the input o (B, C, H, W):

    per image    m, s^2 (B, C) over H, W           s = sqrt(var_unbiased + eps)
                 loss_l = (|mu - m|^2 + |sqrt(var + eps) - s|^2) / B
    per batch    m, s^2 (C,) over B, H, W          s = sqrt(var_unbiased)
                 loss_l = (|mu - m|^2 + |sqrt(var + eps) - s|^2) / C

    min over the inputs of  sum_l loss_l  (+ the first with mu = 0, var = 1 for the inputs themselves)

The first is ZeroQ's (arXiv 2001.00281), the second Genie's (arXiv 2212.04780). What is trained is the picture itself
(`Pixels`), or latents and a small generator that makes it (`Generator`). The model stays as it is.

Text. A language model writes it: the first token is drawn from a list, the next few are the most likely ones, all others
are drawn (LLM-QAT, arXiv 2305.17888; the list of first tokens is that of arXiv 2309.02784).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from laconic.errors import BadInput

__all__ = [
    "Generator", "Pixels", "Synthesized", "generated_text", "matched_inputs", "statistics_loss", "swinging", "watched",
]  # fmt: skip

Per = Literal["image", "batch"]


# --- statistics -------------------------------------------------------------------------------------


def statistics_loss(
    x: Tensor,
    mean: Tensor | float,
    var: Tensor | float,
    *,
    per: Per = "image",
    eps: float = 1e-6,
    unbiased: bool = True,
    divide_by: str | None = None,
) -> Tensor:
    """How far the statistics of x (B, C, ...) are from a mean and a variance (C,); see the module for the equation.

    Args:
        x: of a batch norm's input.
        mean: mu.
        var: sigma^2.
        per: statistics of each image, or of the batch.
        eps: added to the variance under a root.
        unbiased: divide sums of squares by n - 1.
        divide_by: "images" (B), "channels" (C) or "nothing"; that of the equation by default.

    Raises:
        ValueError: no places to take a deviation over.
    """
    axes = tuple(range(2, x.ndim)) if per == "image" else (0, *range(2, x.ndim))
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    if count < 1 + unbiased:
        raise ValueError(
            f"statistics per {per} of inputs {tuple(x.shape)} have no deviation: they are of {count} numbers"
        )
    spread, centre = torch.var_mean(x, axes, correction=int(unbiased))
    deviation = (spread + eps).sqrt() if per == "image" else spread.sqrt()
    want = torch.as_tensor(mean, dtype=x.dtype, device=x.device)
    root = (torch.as_tensor(var, dtype=x.dtype, device=x.device) + eps).sqrt()
    off = (want - centre).square().sum() + (root - deviation).square().sum()
    divide = divide_by or ("images" if per == "image" else "channels")
    if divide not in ("images", "channels", "nothing"):
        raise ValueError(f"divide_by is {divide!r}: it must be images, channels or nothing")
    return off / {"images": x.shape[0], "channels": x.shape[1], "nothing": 1}[divide]


@contextmanager
def watched(model: nn.Module, **options: Any) -> Iterator[list[Tensor]]:
    """The losses of all batch norms of a model, added to the list in every forward; clear it between them.

    Where statistics are of each image, batch norms behind the last pooling have none and are left out.

    Args:
        model: in evaluation mode.
        options: of `statistics_loss`.

    Raises:
        BadInput: the model has no batch norm that remembers statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise BadInput(
            f"{type(model).__name__} has no batch norms that remember statistics, so nothing is known of its data: "
            "give calibration data"
        )
    found: list[Tensor] = []

    of_images = options.get("per", "image") == "image"

    def look(norm: Any, args: tuple) -> None:
        if of_images and args[0][0, 0].numel() < 2:
            return
        found.append(statistics_loss(args[0], norm.running_mean, norm.running_var, **options))

    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def swinging(model: nn.Module) -> Iterator[None]:
    """Every strided convolution sees its input moved by up to one place, at random: no place is skipped for good.

    The input is padded by one on all sides (reflected), and a window of its size is taken anew in every call.
    """

    def swing(conv: Any, args: tuple) -> tuple:
        x = args[0]
        height, width = x.shape[-2:]
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        top, left = (int(torch.randint(3, ())) for _ in range(2))
        return (padded[..., top : top + height, left : left + width], *args[1:])

    handles = [
        m.register_forward_pre_hook(swing) for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- what is trained --------------------------------------------------------------------------------


class Pixels(nn.Module):
    """Inputs that are trained themselves, from noise N(0, 1); Adam, its rate lowered where the loss stands still.

    Args:
        shape: (B, C, ...).
        lr: of Adam.
        start: first values, noise by default.
    """

    def __init__(self, shape: Sequence[int], lr: float = 0.5, start: Tensor | None = None):
        super().__init__()
        self.inputs = nn.Parameter(torch.randn(tuple(shape)) if start is None else start.detach().clone())
        self.lr = lr

    def forward(self) -> Tensor:
        return self.inputs

    def schedule(self) -> Callable[[float], None]:
        """The optimizer's step, to be called with the loss after its backward."""
        optimizer = torch.optim.Adam([self.inputs], lr=self.lr)
        plateau = ReduceLROnPlateau(optimizer, min_lr=1e-4, patience=100)

        def step(loss: float) -> None:
            optimizer.step()
            plateau.step(loss)
            optimizer.zero_grad()

        return step


class Generator(nn.Module):
    """Inputs made by a small network from latents, both trained: Genie-D.

    Linear to (width, S/4, S/4), batch norm, twice as large, 3 x 3, batch norm, LeakyReLU 0.2, twice as large, 3 x 3, tanh,
    batch norm without gain and shift.

    Args:
        shape: (B, C, S, S'), sides that 4 divides.
        latent: numbers of a latent.
        width: channels.
        lr_latent: of Adam on latents, lowered where the loss stands still.
        lr_generator: of Adam on the network, times 0.95 every 100 steps.

    Raises:
        BadInput: sides that 4 does not divide.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 256,
        width: int = 128,
        lr_latent: float = 0.1,
        lr_generator: float = 0.01,
    ):
        super().__init__()
        if len(shape) != 4 or shape[2] % 4 or shape[3] % 4:
            raise BadInput(f"a generator makes pictures (B, C, H, W) whose sides 4 divides, not {tuple(shape)}")
        count, channels, height, wide = shape
        self.latents = nn.Parameter(torch.randn(count, latent))
        self.first = nn.Linear(latent, width * (height // 4) * (wide // 4))
        self.rest = nn.Sequential(
            nn.Unflatten(1, (width, height // 4, wide // 4)),
            nn.BatchNorm2d(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )
        self.lr_latent, self.lr_generator = lr_latent, lr_generator

    def forward(self) -> Tensor:
        return self.rest(self.first(self.latents))

    def schedule(self) -> Callable[[float], None]:
        """As `Pixels.schedule`."""
        network = [p for p in self.parameters() if p is not self.latents]
        of_latents = torch.optim.Adam([self.latents], lr=self.lr_latent)
        of_network = torch.optim.Adam(network, lr=self.lr_generator)
        plateau = ReduceLROnPlateau(of_latents, min_lr=1e-4, patience=100)
        falling, taken = ExponentialLR(of_network, 0.95), [0]

        def step(loss: float) -> None:
            of_latents.step()
            of_network.step()
            plateau.step(loss)
            taken[0] += 1
            if taken[0] % 100 == 0:
                falling.step()
            of_latents.zero_grad()
            of_network.zero_grad()

        return step


@dataclass(frozen=True)
class Synthesized:
    """Inputs (B, ...), and the loss before every step."""

    inputs: Tensor
    losses: list[float]


def matched_inputs(
    model: nn.Module,
    source: Callable[[], Pixels | Generator],
    *,
    steps: int,
    per: Per = "image",
    eps: float = 1e-6,
    unbiased: bool = True,
    include_input: bool = True,
    input_mean: float = 0.0,
    input_std: float = 1.0,
    swing: bool = False,
    seed: int = 0,
) -> Synthesized:
    """Inputs whose statistics are those that a model's batch norms remember.

    Args:
        model: in evaluation mode; neither its parameters nor its statistics are changed.
        source: makes what is trained.
        steps: of training.
        per, eps, unbiased: of `statistics_loss`.
        include_input: the inputs themselves shall have `input_mean` and `input_std`, image by image.
        swing: see `swinging`.
        seed: of all that is drawn; the global random state is left as it was.

    Raises:
        BadInput: the model is in training mode, or has no batch norms; or the loss is not finite.
    """
    if model.training:
        raise BadInput("inputs are matched to what batch norms remember: call model.eval() first")
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    losses: list[float] = []
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        with (
            torch.random.fork_rng(devices=[]),
            watched(model, per=per, eps=eps, unbiased=unbiased) as found,
            torch.enable_grad(),
        ):
            torch.manual_seed(seed)
            made = source()
            step = made.schedule()
            for _ in range(steps):
                found.clear()
                x = made()
                with swinging(model) if swing else nullcontext():
                    model(x)
                if not found:
                    raise BadInput(f"no batch norm of {type(model).__name__} has places to take an image's statistics over")
                loss = torch.stack(found).sum()
                if include_input:
                    loss = loss + statistics_loss(
                        x, input_mean, input_std**2 - eps, per="image", eps=eps, unbiased=unbiased
                    )
                losses.append(float(loss.detach()))
                if not torch.isfinite(loss):
                    raise BadInput(f"matching batch-norm statistics gave a loss of {losses[-1]} at step {len(losses)}")
                loss.backward()
                step(losses[-1])
            with torch.no_grad():
                inputs = made().detach().clone()
    finally:
        for p, want in wanted:
            p.requires_grad_(want)
    return Synthesized(inputs, losses)


# --- text -------------------------------------------------------------------------------------------


@torch.no_grad()
def generated_text(
    model: nn.Module,
    n: int,
    length: int,
    *,
    vocabulary: int | None = None,
    first_tokens: Sequence[int] | None = None,
    greedy: tuple[int, int] = (3, 5),
    temperature: float = 1.0,
    context: int | None = None,
    batch: int = 32,
    seed: int = 0,
) -> Tensor:
    """Token ids (n, length) that a causal language model writes.

    Args:
        model: ids (B, t) -> logits (B, t, V), or an object whose `logits` these are; in evaluation mode.
        n: texts.
        length: tokens of each, the first included.
        vocabulary: V, read off the model's answer by default.
        first_tokens: what a text may begin with; any token by default. Of a model trained on few languages, name tokens
            of these: with rare ones texts are of no use.
        greedy: how many tokens after the first are the most likely ones, drawn anew for each batch from (least, most).
        temperature: of the tokens that are drawn.
        context: tokens that the model can see at once; older ones are left out.
        batch: texts at a time.
        seed: of all that is drawn.

    Raises:
        BadInput: the model is in training mode, a first token that there is not, or logits that are not finite.
    """
    if model.training:
        raise BadInput("text is written by the model at inference: call model.eval() first")
    if n < 1 or length < 1 or not temperature > 0 or not 0 <= greedy[0] <= greedy[1]:
        raise BadInput(
            f"text: n={n}, length={length}, temperature={temperature}, greedy={greedy}: positive numbers, rising"
        )
    generator = torch.Generator().manual_seed(seed)
    size = vocabulary if vocabulary is not None else _logits(model, torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
    allowed = torch.arange(size) if first_tokens is None else torch.as_tensor(list(first_tokens), dtype=torch.int64)
    if not len(allowed) or int(allowed.min()) < 0 or int(allowed.max()) >= size:
        raise BadInput(f"text: the first tokens must be some of the {size} that the model knows")
    texts = []
    for begin in range(0, n, batch):
        count = min(batch, n - begin)
        ids = allowed[torch.randint(len(allowed), (count, 1), generator=generator)]
        certain = int(torch.randint(greedy[0], greedy[1] + 1, (), generator=generator))
        while ids.shape[1] < length:
            logits = _logits(model, ids if context is None else ids[:, -context:])[:, -1].float()
            if not bool(torch.isfinite(logits).any(-1).all()) or bool(torch.isnan(logits).any()):
                raise BadInput(f"{type(model).__name__}: its logits are not finite after {ids.shape[1]} tokens")
            if ids.shape[1] <= certain:
                following = logits.argmax(-1, keepdim=True)
            else:
                following = torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator)
            ids = torch.cat([ids, following.to(ids.device)], 1)
        texts.append(ids)
    return torch.cat(texts)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    held = next(model.parameters(), None)
    answer = model(ids if held is None else ids.to(held.device))
    answer = getattr(answer, "logits", answer)
    return answer[0] if isinstance(answer, (tuple, list)) else answer
