"""What norms over the channels of batches share: where the channels lie, and which tokens are real.

A batch of texts is padded to one length. What stands on padding is no activation of the model, and a norm whose
statistics are over tokens must leave it out:

    with real_tokens(model, attention_mask.bool()):
        loss = model(ids, attention_mask=attention_mask).loss
        loss.backward()        # inside, where activations are recomputed (`torch.utils.checkpoint`)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from laconic.core.statistics import moments, pooled


class ChannelNorm(nn.Module):
    """A norm with one gain and shift per channel, and statistics over all other axes.

    Args:
        num_features: channels.
        channel_dim: the axis that they lie on.
    """

    token_mask: Tensor | None = None

    def __init__(self, num_features: int, channel_dim: int):
        super().__init__()
        if num_features < 1:
            raise ValueError(f"{type(self).__name__}: num_features is {num_features}: it must be 1 or more")
        self.num_features, self.channel_dim = num_features, channel_dim

    def check(self, x: Tensor) -> None:
        """Refuse what has other channels.

        Raises:
            ValueError: by name and shape.
        """
        inside = -x.ndim <= self.channel_dim < x.ndim
        if x.ndim < 2 or not inside or x.shape[self.channel_dim] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: {self.num_features} channels are wanted on axis {self.channel_dim}, "
                f"and the input is {tuple(x.shape)}"
            )

    def shape(self, x: Tensor) -> list[int]:
        """The shape in which a vector over channels broadcasts against x."""
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        return shape

    def axes(self, x: Tensor) -> tuple[int, ...]:
        """The axes that statistics are over."""
        return tuple(axis for axis in range(x.ndim) if axis != self.channel_dim % x.ndim)

    def mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """A mask over tokens as one over x.

        Args:
            x: the input.
            mask: of x's shape without the channels, True for what is real; None takes that of `real_tokens`.

        Raises:
            ValueError: it has another shape.
        """
        mask = self.token_mask if mask is None else mask
        if mask is None:
            return None
        want = tuple(size for axis, size in enumerate(x.shape) if axis != self.channel_dim % x.ndim)
        if tuple(mask.shape) != want:
            raise ValueError(f"{type(self).__name__}: a mask over tokens is {want}, and this is {tuple(mask.shape)}")
        return mask.to(torch.bool).unsqueeze(self.channel_dim % x.ndim)

    def batch_moments(
        self, x: Tensor, mask: Tensor | None, *, centred: bool = True
    ) -> tuple[Tensor | None, Tensor, int]:
        """Mean and spread per channel (C,) over the real tokens, and how many these are."""
        seen = self.mask(x, mask)
        mean, spread = moments(x, self.axes(x), centred=centred, mask=seen, keepdim=False)
        count = int(pooled(x, self.axes(x))) if seen is None else int(seen.sum())
        return mean, spread, count


@contextmanager
def real_tokens(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Within, the norms of a model that pool over tokens leave out those where the mask is False.

    Args:
        model: its norms' inputs are (*mask.shape, channels), or with the channels on their axis.
        mask: (batch, tokens), True for what is real.
    """
    norms = [module for module in model.modules() if isinstance(module, ChannelNorm)]
    before = [norm.token_mask for norm in norms]
    for norm in norms:
        norm.token_mask = mask
    try:
        yield
    finally:
        for norm, old in zip(norms, before, strict=True):
            norm.token_mask = old


CARD = None
