"""`batchformer`: in training, let the examples of a batch look at each other; at inference nothing is left of it.

For features X (B, d) behind the pooling and labels y (B,), with a transformer layer E (attention, then a perceptron of
width d with ReLU, each with its sum and a norm behind it) that reads the batch as a sequence:

    training:  [X; E(X)] (2 B, d), labels [y; y]: one classifier sees both streams, the loss is the mean over 2 B
    inference: X

Since the classifier is shared, it is as good without E, and gradients through E connect the examples: rare classes
learn from frequent ones. There are no positions, so the order of the batch does not matter. For tokens X (B, T, d) (V2)
attention goes over the batch for each place t by itself; a second layer of it, deeper in the network, gets both streams
and looks through the second alone (`streams=2`).

Source: "BatchFormer: Learning to Explore Sample Relationships for Robust Representation Learning", Hou, Yu, Tao, 2022,
arXiv 2203.01522, and its V2, arXiv 2204.01254. Official code: zhihou7/BatchFormer, without a licence at its root.

At inference the layer is the identity; `remove_batchformer` takes it away. Use it where some classes are rare, or test
data come from other places. With several processes each has the batch of its own device.

Example:
    >>> import torch
    >>> from laconic.norm import BatchFormer
    >>> layer, x, y = BatchFormer(8), torch.randn(5, 8), torch.arange(5)
    >>> layer(x).shape, layer.labels(y).tolist()
    (torch.Size([10, 8]), [0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    >>> layer.eval()(x) is x
    True
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laconic.core.card import Card
from laconic.core.surgery import Swapped, swap
from laconic.errors import BadInput


class BatchFormer(nn.Module):
    """The layer: (B, d), or (B, T, d), gives twice the batch in training and itself in evaluation mode.

    Args:
        dim: d.
        heads: of attention.
        ff: width of the perceptron; d by default.
        dropout: of the layer; the paper has 0.5, or less.
        streams: 1 reads X and gives [X; E(X)]; 2 reads [X; X'] and gives [X; E(X')].
        device, dtype: of the parameters.

    Raises:
        ValueError: heads that do not divide d, streams other than 1 and 2; in the call, an input of another shape.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        ff: int | None = None,
        dropout: float = 0.5,
        *,
        streams: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"batchformer: {heads} heads do not share {dim} features evenly")
        if streams not in (1, 2):
            raise ValueError(f"batchformer: streams is {streams}: it is 1, or 2 behind another of these layers")
        self.dim, self.streams = dim, streams
        self.encoder = nn.TransformerEncoderLayer(
            dim, heads, dim if ff is None else ff, dropout, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in (2, 3) or x.shape[-1] != self.dim:
            raise ValueError(
                f"batchformer: an input of {tuple(x.shape)}: it must be (B, {self.dim}) or (B, T, {self.dim})"
            )
        if not self.training:
            return x
        first, second = x, x
        if self.streams == 2:
            if x.shape[0] % 2:
                raise ValueError(f"batchformer: a batch of {x.shape[0]} is not two streams")
            first, second = x.chunk(2)
        # The batch is the sequence, and what torch takes for the batch are the places.
        seen = self.encoder(second if x.ndim == 3 else second.unsqueeze(1))
        return torch.cat([first, seen if x.ndim == 3 else seen.squeeze(1)])

    def labels(self, labels: Tensor) -> Tensor:
        """What the loss is to compare with: [y; y] in training where the layer made two streams of one."""
        return torch.cat([labels, labels]) if self.training and self.streams == 1 else labels

    def extra_repr(self) -> str:
        return f"{self.dim}" + ", streams=2" * (self.streams == 2)


def remove_batchformer(model: nn.Module) -> Swapped:
    """Take every `BatchFormer` out of a trained model, in place: the function at inference stays.

    Returns:
        What was replaced.

    Raises:
        BadInput: there is none.
    """
    if not any(isinstance(module, BatchFormer) for module in model.modules()):
        raise BadInput(f"batchformer: {type(model).__name__} has no BatchFormer to remove")

    def nothing(_: nn.Module) -> nn.Module:
        return nn.Identity()

    return swap(model, BatchFormer, nothing, keep=False)


CARD = Card(
    id="batchformer",
    title="BatchFormer: Learning to Explore Sample Relationships for Robust Representation Learning",
    authors="Hou, Yu, Tao",
    year=2022,
    source="arXiv 2203.01522",
    family="norm",
    summary="Lets the examples of a training batch look at each other, so that rare classes learn from frequent ones; gone "
    "at inference.",
    objects={"BatchFormer": "Layer"},
    traits={"BatchFormer": ("gradient:exact", "batch_independent_eval")},
    use="Classification where some classes are rare, or test data come from elsewhere.",
    avoid="Batches of a few examples, and losses that cannot take every label twice.",
    composes=("ibn",),
    code="github.com/zhihou7/BatchFormer, no licence",
    claim={
        "text": "Trained on digits of which half the classes are ten times rarer, a network is more accurate on those with "
        "BatchFormer than without, by more than a point.",
        "metric": "accuracy on the rare classes",
        "direction": "higher",
        "margin": 0.01,
        "arms": ("plain", "batchformer"),
        "seeds": 5,
        "minutes": 6,
        "task": "mnist-cnn",
    },
)
