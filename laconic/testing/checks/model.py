"""The contract of a Model: an `nn.Module` built from a config.

    Example(lambda: LlamaLike(small), kind="Model", traits=("causal",), inputs=[Ints((2, 7), 50)],
            stated={"parameters": 12345, "published": (lambda: LlamaLike(full), 124_439_808)})

`inputs`: one entry per argument of forward, batch first. `stated["parameters"]`: how many the small one has, ties counted
once. `stated["published"]`: the published config (built on meta) and the published count, where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.errors import BadInput

from ..contract import needs, require
from ..example import Example
from ..tensors import close, floats, same, tensors
from . import _modules


def check_model_forward(example: Example) -> None:
    """The output is finite, and each example's does not depend on its batch."""
    model, arguments = example.build().double().eval(), example.arguments(dtype=torch.float64)
    whole = floats(model(*arguments))
    require(whole, "the output has no floating-point tensor")
    _modules.finite(whole, "the output")
    size = arguments[0].shape[0]
    one = tuple(a[:1] if isinstance(a, Tensor) and a.ndim and a.shape[0] == size else a for a in arguments)
    close(floats(model(*one)), [t[:1] for t in whole], "an example gives another output alone than in its batch")


def check_model_backward(example: Example) -> None:
    """Every trainable parameter gets a finite gradient."""
    arguments = example.arguments()
    inputs = [a.requires_grad_() for a in floats(arguments)]
    _modules.gradients_arrive(example.build().train(), arguments, inputs)


def check_model_learns(example: Example) -> None:
    """Thirty steps of Adam towards random targets lower the loss."""
    model, arguments = example.build().train(), example.arguments()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    target = torch.randn(floats(model(*arguments))[0].shape, generator=example.generator(1))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (floats(model(*arguments))[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    require(losses[-1] < losses[0], f"the loss went from {losses[0]:.4g} to {losses[-1]:.4g} in 30 steps")


def check_model_parameter_count(example: Example) -> None:
    """It has as many parameters as stated, and as published where that is given."""
    if "parameters" not in example.stated:
        raise BadInput(f"the example {example.name} does not state its size: give stated={{'parameters': ...}}")
    found = _count(example.build())
    require(found == example.stated["parameters"], f"it has {found} parameters, not {example.stated['parameters']}")
    if "published" in example.stated:
        build, published = example.stated["published"]
        with torch.device("meta"):
            found = _count(build())
        require(found == published, f"the published config has {found} parameters, not {published}")


def check_model_state_dict(example: Example) -> None:
    """The state dict holds everything that evaluation depends on."""
    _modules.state_round_trip(example)


def check_model_eval_deterministic(example: Example) -> None:
    """Evaluation is a function: no randomness, and no state is changed."""
    _modules.eval_deterministic(example)


def check_model_repeats_from_seed(example: Example) -> None:
    """The same seed gives the same initial model."""
    states = []
    for _ in range(2):
        with example.seeded(seed=7):
            states.append(example.build().state_dict())
    same(states[0], states[1], "the same seed gives another model")


def check_model_keeps_input(example: Example) -> None:
    """The input is not changed in place."""
    _modules.keeps_input(example)


def check_model_export(example: Example) -> None:
    """`torch.export` takes the model in evaluation mode."""
    _modules.exports(example)


@needs("causal")
def check_model_causal(example: Example) -> None:
    """What comes later in the sequence (dimension 1 of the first input) does not change what came out before."""
    model, arguments = example.build().double().eval(), example.arguments(dtype=torch.float64)
    first, other = arguments[0], example.arguments(dtype=torch.float64, seed=1)[0]
    cut = first.shape[1] // 2
    mixed = torch.cat([first[:, :cut], other[:, cut:]], dim=1)
    want, got = tensors(model(*arguments))[0], tensors(model(mixed, *arguments[1:]))[0]
    close(got[:, :cut], want[:, :cut], "later inputs change earlier outputs")


def _count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
