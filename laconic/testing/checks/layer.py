"""The contract of a Layer: an `nn.Module` that stands where a torch layer stood.

    Example(lambda: RMSNorm(16), kind="Layer", inputs=[(3, 5, 16)], wrong=[(3, 5, 15)])

`inputs`: one entry per argument of forward, the first dimension is the batch (two or more).
`wrong`: inputs that must be refused. `stated["output"]`: the shape of the output where it is not that of the first input.
`stated["channel"]`: the dimension that `as_affine` is about (default: 1), for a layer that folds.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..contract import LeftOut, needs, require
from ..example import Example
from ..tensors import close, floats, same, shape_of, tensors
from . import _modules

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def check_layer_shape(example: Example) -> None:
    """The output has the stated shape, in training and in evaluation mode."""
    arguments = example.arguments()
    want = tuple(example.stated.get("output", tuple(arguments[0].shape)))
    for training in (True, False):
        got = shape_of(example.build().train(training)(*arguments))
        require(got and got[0] == want, f"the output is {got}, and {want} is stated")


def check_layer_dtypes(example: Example) -> None:
    """`layer.to(dtype)` gives that dtype back, and finite values, in float32, float64 and bfloat16."""
    for dtype in _DTYPES:
        output = example.build().to(dtype)(*example.arguments(dtype=dtype))
        for tensor in floats(output):
            require(tensor.dtype == dtype, f"a {dtype} input gives a {tensor.dtype} output")
        _modules.finite(output, f"the output in {dtype}")


def check_layer_signature(example: Example) -> None:
    """Like torch's layers, one with parameters or buffers takes `device` and `dtype`."""
    layer = example.build()
    if not layer.state_dict():
        raise LeftOut("it has no parameter and no buffer")
    accepted = inspect.signature(type(layer)).parameters
    missing = [name for name in ("device", "dtype") if name not in accepted]
    require(not missing, f"{type(layer).__name__}(...) does not take {' and '.join(missing)}")


def check_layer_state_dict(example: Example) -> None:
    """The state dict holds everything that evaluation depends on."""
    _modules.state_round_trip(example)


def check_layer_eval_deterministic(example: Example) -> None:
    """Evaluation is a function: no randomness, and no state is changed."""
    _modules.eval_deterministic(example)


@needs("batch_independent_eval")
def check_layer_batch_independent_eval(example: Example) -> None:
    """An example's output does not depend on its batch."""
    layer, arguments = example.build(), example.arguments()
    _modules.trained(layer, arguments)
    layer, arguments = layer.double().eval(), example.arguments(dtype=torch.float64)
    whole = tensors(layer(*arguments))
    for i in range(arguments[0].shape[0]):
        alone = tensors(layer(*_batch(arguments, slice(i, i + 1))))
        close(alone, [t[i : i + 1] for t in whole], f"example {i} gives another output alone than in its batch")


def check_layer_batch_of_one(example: Example) -> None:
    """A batch of one works in evaluation mode; training on it works or is refused by a ValueError."""
    layer, one = example.build(), _batch(example.arguments(), slice(0, 1))
    _modules.finite(layer.eval()(*one), "the output for a batch of one in evaluation mode")
    layer = example.build().train()
    try:
        output = layer(*one)
    except ValueError:
        return
    _modules.finite(output, "the output for a batch of one in training mode")


def check_layer_noncontiguous(example: Example) -> None:
    """Strides do not matter."""
    layer, arguments = example.build().double().eval(), example.arguments(dtype=torch.float64)
    want = layer(*arguments)
    strided = tuple(_strided(a) if isinstance(a, Tensor) else a for a in arguments)
    close(layer(*strided), want, "a non-contiguous input gives another output")


def check_layer_export(example: Example) -> None:
    """`torch.export` takes the layer in evaluation mode."""
    _modules.exports(example)


def check_layer_keeps_input(example: Example) -> None:
    """The input is not changed in place."""
    _modules.keeps_input(example)


def check_layer_refuses_wrong_shape(example: Example) -> None:
    """A wrong shape is refused by an error that says what was found."""
    for training in (True, False):
        layer = example.build().train(training)
        _modules.refuses(layer, example.wrong_arguments(), example.arguments(), "an input of a wrong shape")


def check_layer_gradient(example: Example) -> None:
    """Gradients reach every parameter and input; they are the derivative, unless another gradient is declared."""
    if "gradient:none" in example.traits:
        raise LeftOut("it declares 'gradient:none'")
    arguments = example.arguments()
    inputs = [a.requires_grad_() for a in floats(arguments)]
    _modules.gradients_arrive(example.build().train(), arguments, inputs)
    if not {"gradient:surrogate", "gradient:stateful"} & set(example.traits):
        for training in (True, False):
            layer, mode = example.build().train(training), "training" if training else "evaluation"
            _modules.gradient_exact(layer, example.arguments(dtype=torch.float64), f"in {mode} mode")


@needs("folds")
def check_layer_folds(example: Example) -> None:
    """`as_affine()` gives the scale and shift per channel that the layer applies in evaluation mode."""
    layer, arguments = example.build(), example.arguments()
    _modules.trained(layer, arguments)
    layer, arguments = layer.double().eval(), example.arguments(dtype=torch.float64, seed=1)
    scale, shift = layer.as_affine()
    shape = [1] * arguments[0].ndim
    shape[example.stated.get("channel", 1)] = -1
    close(arguments[0] * scale.view(shape) + shift.view(shape), layer(*arguments), "as_affine() is another function")


def check_layer_repeats_from_seed(example: Example) -> None:
    """The same seed gives the same initial state."""
    states = []
    for _ in range(2):
        with example.seeded(seed=7):
            states.append(example.build().state_dict())
    same(states[0], states[1], "the same seed gives other initial values")


def _batch(arguments: tuple, rows: slice) -> tuple:
    size = arguments[0].shape[0]
    return tuple(a[rows] if isinstance(a, Tensor) and a.ndim and a.shape[0] == size else a for a in arguments)


def _strided(tensor: Tensor) -> Tensor:
    """The same values, with every dimension's stride doubled and the first two in the other order."""
    wide = tensor.new_zeros([2 * size for size in tensor.shape])
    if tensor.ndim > 1:
        wide = wide.transpose(0, 1).contiguous().transpose(0, 1)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view
