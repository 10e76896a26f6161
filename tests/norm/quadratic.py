"""What the tests of norms with a state in both passes share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps(norm: nn.Module, inputs: list[Tensor], grads: list[Tensor], how: str = "plain") -> list[Tensor]:
    """Outputs and input gradients of one call after another; `how` says through which kind of checkpointing."""
    found = []
    for x, grad in zip(inputs, grads, strict=True):
        x = x.clone().requires_grad_()
        y = norm(x) if how == "plain" else checkpoint(norm, x, use_reentrant=how == "reentrant")
        y.backward(grad)
        found += [y.detach(), x.grad]
    return found


def same_under_checkpointing(norm: nn.Module, how: str, channels: int) -> None:
    """Outputs, gradients and state are those without; also where two checkpoints wait for one backward."""
    inputs, grads = ([drawn(4, 5, channels, seed=s + k) for s in range(8)] for k in (0, 50))
    other = copy.deepcopy(norm)
    want, got = steps(norm, inputs, grads), steps(other, inputs, grads, how)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(other.state_dict(), norm.state_dict())
    assert not other._pending or how == "reentrant"
    # Twice in one forward, the second on what the first made.
    pair = [inputs[0].clone().requires_grad_() for _ in range(2)]
    norm(norm(pair[0])).backward(grads[0])
    between = checkpoint(other, pair[1], use_reentrant=how == "reentrant")
    checkpoint(other, between, use_reentrant=how == "reentrant").backward(grads[0])
    torch.testing.assert_close(pair[1].grad, pair[0].grad)
    torch.testing.assert_close(other.state_dict(), norm.state_dict())
