"""`layernorm`: normalize each example over its own features; with the gated recurrent cells that the paper built of it.

For x (..., d), gain g (d,), shift b (d,), mean and biased variance taken over the d features of one example:

    LN(x) = g (x - mean) / sqrt(var + eps) + b

There is no running state: training and inference are the same function, at any batch size. In a recurrent network the
sum that reaches a gate is normalized at every step, so that it neither grows nor fades with the length of the sequence.
For inputs x_t (B, I) and states h (B, H), with matrices W (I -> 3 H or 4 H) and U (H -> likewise) and a norm, with gain
and shift of its own, wherever LN stands:

    GRU     r, u = sigmoid(LN(U_ru h) + LN(W_ru x + b_ru))                     each LN over the 2 H features together
            n    = tanh(r * LN(U_n h) + LN(W_n x + b_n))                       h <- u h + (1 - u) n
    LSTM    i, f, n, o = LN(U h) + LN(W x + b) + b                             each LN over the 4 H features together
            c <- sigmoid(f) c + sigmoid(i) tanh(n)                             h <- sigmoid(o) tanh(LN(c))

u keeps the old state. The bias of the LSTM enters twice, inside the norm and behind it, as in the paper's code. The
normalized cell only makes h: the cell that recurs stays as it is. Where a step is masked, the state is kept.

Source: "Layer Normalization", Ba, Kiros, Hinton, 2016, arXiv 1607.06450. Official code: ryankiros/layer-norm, without a
licence. We differ in the order of gates, which is torch's (r, u, n and i, f, n, o), in the first input weights, which
are those of `torch.nn.GRU` (the norm forgets their scale), and in computing float16 and bfloat16 norms in float32.
Other cells go by the same name: those that normalize each gate by itself, or the cell inside the recurrence, are
different functions, and weights do not carry over.

At inference gain and shift fold into the layers that read the norm if it is their only source; the division stays.

`LayerNorm` is torch's. Use it in transformers and recurrent networks, at any batch size; `rmsnorm` saves the mean. Not
over a handful of features: what is nearly constant is blown up to variance 1. A large forget bias, the usual trick for
long memories, does less here, for the norm's gain bounds what it is added to.

Example:
    >>> import torch
    >>> from laconic.norm import LayerNormGRU
    >>> cell = LayerNormGRU(5, 8)
    >>> mask = torch.tensor([[1, 1], [1, 0], [1, 0]])
    >>> outputs, last = cell(torch.randn(3, 2, 5), mask=mask)
    >>> outputs.shape, torch.equal(outputs[0, 1], last[1])
    (torch.Size([3, 2, 8]), True)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.core.card import Card

LayerNorm = nn.LayerNorm

GRU_GATES, LSTM_GATES = 3, 4

# --- mathematics: one step ------------------------------------------------------------------------------


def gru_step(gates: Tensor, candidate: Tensor, h: Tensor, hidden_gates: Tensor, hidden_candidate: Tensor) -> Tensor:
    """The next state (B, H).

    Args:
        gates: (B, 2 H), what the input gives r and u, normalized.
        candidate: (B, H), what it gives n, normalized.
        h: (B, H), the state.
        hidden_gates: (B, 2 H), what the state gives r and u, normalized.
        hidden_candidate: (B, H), what it gives n, normalized.
    """
    r, u = torch.sigmoid(gates + hidden_gates).chunk(2, -1)
    n = torch.tanh(r * hidden_candidate + candidate)
    return u * h + (1 - u) * n


def lstm_step(sums: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The next cell and the open share of it, both (B, H).

    Args:
        sums: (B, 4 H), what reaches i, f, n and o.
        c: (B, H), the cell.
    """
    i, f, n, o = sums.chunk(LSTM_GATES, -1)
    return torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(n), torch.sigmoid(o)


# --- the layers -----------------------------------------------------------------------------------------


class _Recurrent(nn.Module):
    """What both cells hold: matrices of all gates, a bias, and the shapes of what they are given."""

    def __init__(
        self,
        gates: int,
        input_size: int,
        hidden_size: int,
        eps: float,
        batch_first: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        if input_size < 1 or hidden_size < 1:
            raise ValueError(f"layernorm: sizes of at least 1 are needed, not {input_size} and {hidden_size}")
        self.gates, self.input_size, self.hidden_size = gates, input_size, hidden_size
        self.eps, self.batch_first = eps, batch_first
        rows = gates * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))

    def _norm(self, features: int) -> nn.LayerNorm:
        return nn.LayerNorm(features, self.eps, device=self.bias.device, dtype=self.bias.dtype)

    def reset_parameters(self) -> None:
        """Recurrent matrices orthogonal gate by gate, input matrices as torch has them, biases 0, norms plain."""
        nn.init.uniform_(self.weight_ih, -1 / math.sqrt(self.hidden_size), 1 / math.sqrt(self.hidden_size))
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            for block in self.weight_hh.split(self.hidden_size):
                # In float32: torch has no orthogonal matrices of less.
                block.copy_(nn.init.orthogonal_(torch.empty(block.shape, device=block.device)))
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def _checked(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor] | None]:
        """x as (T, B, I), and the mask of each step as (B, 1) booleans."""
        layout = "(B, T, I)" if self.batch_first else "(T, B, I)"
        if x.ndim != 3 or x.shape[-1] != self.input_size:
            raise ValueError(f"layernorm: an input of {tuple(x.shape)}: it must be {layout} with I = {self.input_size}")
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"layernorm: a mask of {tuple(mask.shape)}: it must be {tuple(x.shape[:2])}, as the input")
        if self.batch_first:
            x, mask = x.transpose(0, 1), None if mask is None else mask.transpose(0, 1)
        return x, None if mask is None else list((mask != 0).unsqueeze(-1))

    def _state(self, state: Tensor | None, like: Tensor) -> Tensor:
        if state is None:
            return like.new_zeros(like.shape[1], self.hidden_size)
        if state.shape != (like.shape[1], self.hidden_size):
            want = (like.shape[1], self.hidden_size)
            raise ValueError(f"layernorm: a state of {tuple(state.shape)}: it must be {want}")
        return state

    def _stacked(self, states: list[Tensor], like: Tensor) -> Tensor:
        empty = like.new_zeros(0, like.shape[1], self.hidden_size)  # a sequence of no steps has no states
        out = torch.stack(states) if states else empty
        return out.transpose(0, 1) if self.batch_first else out

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, eps={self.eps}" + ", batch_first=True" * self.batch_first


class LayerNormGRU(_Recurrent):
    """A layer of gated recurrent units with layer norms: (T, B, I) -> (T, B, H) and the last state (B, H).

    Args:
        input_size: I.
        hidden_size: H.
        eps: of the norms.
        batch_first: inputs, outputs and masks have the batch before the time.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below 1; in the call, an input, mask or state of another shape.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(GRU_GATES, input_size, hidden_size, eps, batch_first, device, dtype)
        self.norm_ih_gates, self.norm_ih_candidate = self._norm(2 * hidden_size), self._norm(hidden_size)
        self.norm_hh_gates, self.norm_hh_candidate = self._norm(2 * hidden_size), self._norm(hidden_size)
        self.reset_parameters()

    def forward(self, x: Tensor, h: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All states, and the last.

        Args:
            x: (T, B, I).
            h: (B, H), the first state; 0 by default.
            mask: (T, B), 0 where a step is not there.
        """
        x, masks = self._checked(x, mask)
        h = self._state(h, x)
        split = [2 * self.hidden_size, self.hidden_size]
        # What the inputs give does not depend on the state: all steps at once.
        gates, candidates = F.linear(x, self.weight_ih, self.bias).split(split, -1)
        gates, candidates = self.norm_ih_gates(gates), self.norm_ih_candidate(candidates)
        states = []
        for t in range(x.shape[0]):
            hidden_gates, hidden_candidate = F.linear(h, self.weight_hh).split(split, -1)
            hidden = self.norm_hh_gates(hidden_gates), self.norm_hh_candidate(hidden_candidate)
            after = gru_step(gates[t], candidates[t], h, *hidden)
            h = after if masks is None else torch.where(masks[t], after, h)
            states.append(h)
        return self._stacked(states, x), h


class LayerNormLSTM(_Recurrent):
    """A layer of long short-term memory with layer norms: (T, B, I) -> (T, B, H) and the last (h, c), each (B, H).

    Args:
        input_size: I.
        hidden_size: H.
        norm_cell: normalize the cell where it makes h.
        eps: of the norms.
        batch_first: inputs, outputs and masks have the batch before the time.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below 1; in the call, an input, mask or state of another shape.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        norm_cell: bool = True,
        *,
        eps: float = 1e-5,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(LSTM_GATES, input_size, hidden_size, eps, batch_first, device, dtype)
        self.norm_ih, self.norm_hh = self._norm(LSTM_GATES * hidden_size), self._norm(LSTM_GATES * hidden_size)
        self.norm_c = self._norm(hidden_size) if norm_cell else nn.Identity()
        self.reset_parameters()

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """All states, and the last with its cell.

        Args:
            x: (T, B, I).
            state: the first (h, c), each (B, H); 0 by default.
            mask: (T, B), 0 where a step is not there.
        """
        outputs, cells, h = self._run(x, state, mask)
        return outputs, (h, cells[-1])

    def cells(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """The cell after every step, (T, B, H); arguments as those of the call."""
        return self._stacked(self._run(x, state, mask)[1][1:], self._checked(x, mask)[0])

    def _run(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        x, masks = self._checked(x, mask)
        h, c = (self._state(part, x) for part in (state or (None, None)))
        sums = self.norm_ih(F.linear(x, self.weight_ih, self.bias)) + self.bias
        states, cells = [], [c]
        for t in range(x.shape[0]):
            c_after, opened = lstm_step(sums[t] + self.norm_hh(F.linear(h, self.weight_hh)), c)
            c_after = c_after if masks is None else torch.where(masks[t], c_after, c)
            h_after = opened * torch.tanh(self.norm_c(c_after))
            h = h_after if masks is None else torch.where(masks[t], h_after, h)
            c = c_after
            states.append(h)
            cells.append(c)
        return self._stacked(states, x), cells, h


CARD = Card(
    id="layernorm",
    title="Layer Normalization",
    authors="Ba, Kiros, Hinton",
    year=2016,
    source="arXiv 1607.06450",
    family="norm",
    summary="Normalizes each example over its own features, the same in training and at inference; with the paper's GRU "
    "and LSTM built of it.",
    objects={"LayerNorm": "Layer", "LayerNormGRU": "Layer", "LayerNormLSTM": "Layer"},
    traits={
        "LayerNorm": ("gradient:exact", "batch_independent_eval"),
        "LayerNormGRU": ("gradient:exact", "batch_independent_eval"),
        "LayerNormLSTM": ("gradient:exact", "batch_independent_eval"),
    },
    use="Transformers and recurrent networks, at any batch size.",
    avoid="A handful of features, whose noise it blows up; where the mean need not go, rmsnorm costs less.",
    composes=("rmsnorm",),
    vectors=("ln_rnn",),
    code="github.com/ryankiros/layer-norm, no licence",
    claim={
        "text": "A recurrent network converges in fewer steps with layer norms: after 300 steps a GRU over characters "
        "needs fewer bits per character than one without, by more than 0.05.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.05,
        "arms": ("gru", "layernorm_gru"),
        "seeds": 5,
        "minutes": 6,
        "task": "chars",
    },
)
