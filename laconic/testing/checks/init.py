"""The contract of an Init: `init_(module)` sets a module's parameters, with random numbers from a generator.

    Example(lambda: zero_init_, kind="Init", traits=("deterministic",), inputs=lambda g: [nn.Linear(8, 8)], holds=...)

`inputs`: the module. `holds(module)`: whether the values are what the method states (mean, spread, exact values).
Without the trait "deterministic" the object is called as `init_(module, generator=g)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from laconic.errors import BadInput

from ..contract import LeftOut, require
from ..example import Example
from ..tensors import copied, same


def check_init_repeats_from_seed(example: Example) -> None:
    """The same seed gives the same values, whatever stood there before."""
    first, second = _initialized(example, 0), _initialized(example, 0, before=1)
    same(first.state_dict(), second.state_dict(), "the same seed gives other values")


def check_init_depends_on_seed(example: Example) -> None:
    """Another seed gives other values."""
    if "deterministic" in example.traits:
        raise LeftOut("it declares 'deterministic'")
    first, second = _initialized(example, 0), _initialized(example, 1)
    pairs = zip(copied(first.state_dict()), copied(second.state_dict()), strict=True)
    require(any(not torch.equal(a, b) for a, b in pairs), "every seed gives the same values: declare 'deterministic'")


def check_init_leaves_global_random_numbers(example: Example) -> None:
    """Global random numbers are not drawn: the generator is the only source."""
    module = example.arguments()[0]
    before = torch.get_rng_state()
    _init(example, module, 0)
    require(torch.equal(torch.get_rng_state(), before), "global random numbers were drawn")


def check_init_values(example: Example) -> None:
    """The values are what the method states."""
    if example.holds is None:
        raise BadInput(f"the example {example.name} does not say what must hold: give Example(holds=...)")
    for seed in range(3):
        require(bool(example.holds(_initialized(example, seed))), f"with seed {seed} the values are not what is stated")


def check_init_keeps_parameters(example: Example) -> None:
    """Parameters are filled in place: the same objects, types, shapes and trainability, outside of autograd."""
    module = example.arguments()[0]
    before = {n: (p, p.dtype, p.shape, p.requires_grad) for n, p in module.named_parameters()}
    _init(example, module, 0)
    after = dict(module.named_parameters())
    require(list(after) == list(before), f"the parameters were {list(before)} and are {list(after)}")
    for name, (parameter, *kept) in before.items():
        require(after[name] is parameter, f"{name} is another object: optimizers and ties would lose it")
        now = [parameter.dtype, parameter.shape, parameter.requires_grad]
        require(now == kept, f"{name} was {kept} and is {now}")
        require(parameter.is_leaf and parameter.grad_fn is None, f"{name} is recorded by autograd")


def check_init_dtypes(example: Example) -> None:
    """float64 and bfloat16 modules are filled with finite values too."""
    for dtype in (torch.float64, torch.bfloat16):
        module = example.arguments()[0].to(dtype)
        _init(example, module, 0)
        for name, parameter in module.named_parameters():
            require(parameter.dtype == dtype, f"{name} was {dtype} and is {parameter.dtype}")
            require(bool(torch.isfinite(parameter).all()), f"{name} is not finite in {dtype}")


def _initialized(example: Example, seed: int, before: int = 0) -> nn.Module:
    module = example.arguments(seed=before)[0]
    _init(example, module, seed)
    return module


def _init(example: Example, module: nn.Module, seed: int) -> Any:
    if "deterministic" in example.traits:
        return example.build()(module)
    return example.build()(module, generator=example.generator(seed))
