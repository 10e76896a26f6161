"""`muon`: momentum, and then a step whose singular values are all near one: every direction of a matrix moves alike.

For the gradient G of a weight matrix (m, n), at each step

    M <- beta M + (1 - beta) G                        U = M        nesterov: (1 - beta) G + beta M
    O = newton_schulz(U)                              ~ P Q^T for the singular value decomposition U = P S Q^T
    W <- W (1 - lr decay) - lr s O                    s = sqrt(max(1, m / n))

Newton-Schulz is `ns_steps` times X <- a X + (b A + c A^2) X with A = X X^T, from X = U / (|U|_F + eps). It uses
products alone, in `precision`, and leaves singular values in about [0.7, 1.2]. A weight of more dimensions (a
convolution) is taken as the matrix (out, rest). With scale="match_rms_adamw", s = 0.2 sqrt(max(m, n)): the entries of
a step are then about as large as AdamW's, whose learning rate and weight decay can be kept.

It is made for the hidden matrices. Embeddings, the output layer and whatever has one dimension take AdamW, in groups
with `muon=False`:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    p <- p (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + adam_eps)

`muon_groups(model)` makes the two groups. A schedule scales the learning rates of both.

Source: "Muon: An optimizer for hidden layers in neural networks", Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein,
2024, kellerjordan.github.io/posts/muon; scale "match_rms_adamw" from "Muon is Scalable for LLM Training", Liu et al.,
2025, arXiv 2502.16982. Official code: KellerJordan/Muon, MIT. We differ from it in: s is that of the matrix which was
orthogonalized, where the released code takes the last two sizes of a convolution (height and width of its kernel).
`torch.optim.Muon` takes matrices alone, and no other precision than bfloat16.

Nothing is left at inference. Use AdamW for fine-tuning what AdamW has trained, and for models with few hidden matrices.

Example:
    >>> import torch
    >>> from laconic.optim import Muon, muon_groups
    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 10))
    >>> optimizer = Muon(muon_groups(model, adam=["2.*"], lr=0.02, adam_lr=3e-4))
    >>> [(group["muon"], group["lr"], len(group["params"])) for group in optimizer.param_groups]
    [(True, 0.02, 1), (False, 0.0003, 4)]
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from laconic.core.card import Card
from laconic.core.spectral import QUINTIC, Coefficients, as_matrix, newton_schulz
from laconic.errors import BadInput

from ._common import evaluate, not_negative, share, trained

# None: that of the gradient. Names, because a state dict holds nothing but numbers, texts and tensors.
PRECISIONS = {None: None, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def muon(
    gradient: Tensor,
    buffer: Tensor,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    coefficients: Coefficients = QUINTIC,
    eps: float = 1e-7,
    scale: str = "original",
    precision: str | None = "bfloat16",
) -> Tensor:
    """s O for a gradient (m, ...), in its shape; `buffer` is M and takes the gradient in, in place."""
    buffer.lerp_(gradient, 1 - momentum)
    matrix = as_matrix(gradient.lerp(buffer, momentum) if nesterov else buffer)
    even = newton_schulz(matrix, [coefficients] * ns_steps, eps=eps, dtype=PRECISIONS[precision])
    return even.mul(SCALES[scale](*matrix.shape)).view_as(gradient).to(gradient.dtype)


def adam(
    gradient: Tensor, mean: Tensor, square: Tensor, step: int, *, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam's update of step number `step` (1 is the first); `mean` and `square` take the gradient in, in place."""
    b1, b2 = betas
    mean.lerp_(gradient, 1 - b1)
    square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    return (mean / (1 - b1**step)) / ((square / (1 - b2**step)).sqrt() + eps)


def muon_groups(
    model: nn.Module, adam: Sequence[str] = (), *, lr: float = 0.02, adam_lr: float = 3e-4
) -> list[dict[str, Any]]:
    """Two groups of a model's parameters: hidden matrices for Muon, the rest for AdamW.

    Embeddings (and what is tied to them) and parameters of fewer than two dimensions are the rest.

    Args:
        model: whose parameters are trained.
        adam: patterns of further names for AdamW, as "lm_head.*": an output layer that is not tied belongs here.
        lr: learning rate of Muon.
        adam_lr: learning rate of AdamW.

    Raises:
        BadInput: a pattern fits no parameter's name, or no hidden matrix is left.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in adam:
        if not fnmatch.filter(names, pattern):
            raise BadInput(f"muon_groups: no parameter's name fits {pattern!r}; they are {', '.join(names)}")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            other = p.ndim < 2 or id(p) in embeddings or any(fnmatch.fnmatchcase(name, one) for one in adam)
            (rest if other else matrices).append(p)
    if not matrices:
        raise BadInput("muon_groups: the model has no hidden matrix that is trained: use AdamW")
    groups = [{"params": matrices, "lr": lr, "muon": True}, {"params": rest, "lr": adam_lr, "muon": False}]
    return [group for group in groups if group["params"]]


class Muon(Optimizer):
    """Orthogonalized momentum for hidden matrices, AdamW for groups with `muon=False`.

    Args:
        params: parameters, or groups of them, as `muon_groups` makes.
        lr: learning rate.
        momentum: beta.
        weight_decay: pull towards zero, apart from the gradient as in AdamW; in both kinds of groups.
        nesterov: Nesterov momentum.
        ns_steps: of Newton-Schulz.
        coefficients: (a, b, c) of each of them.
        eps: added to the Frobenius norm.
        scale: "original" or "match_rms_adamw".
        precision: what Newton-Schulz computes in: "bfloat16", "float32", "float64", or None for the gradient's own.
        muon: whether parameters take Muon (they need two dimensions then) or AdamW.
        betas: decay rates of AdamW.
        adam_eps: added to the root of AdamW's mean square.

    Raises:
        BadInput: an option is out of its range, or a parameter has too few dimensions for Muon.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        *,
        ns_steps: int = 5,
        coefficients: Coefficients = QUINTIC,
        eps: float = 1e-7,
        scale: str = "original",
        precision: str | None = "bfloat16",
        muon: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-10,
    ):
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "ns_steps": ns_steps,
            "coefficients": tuple(coefficients), "eps": eps, "scale": scale, "precision": precision, "muon": muon,
            "betas": tuple(betas), "adam_eps": adam_eps,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, once its options are known to be possible.

        Raises:
            BadInput: an option is out of its range, or a parameter has too few dimensions for Muon.
        """
        group = {**self.defaults, **param_group}
        not_negative("Muon", **{name: group[name] for name in ("lr", "weight_decay", "eps", "adam_eps", "ns_steps")})
        betas = group["betas"]
        share("Muon", momentum=group["momentum"], **{"betas[0]": betas[0], "betas[1]": betas[1]})
        for name, known in (("scale", SCALES), ("precision", PRECISIONS)):
            if group[name] not in known:
                raise BadInput(f"Muon: {name} is {group[name]!r}: choose one of {', '.join(map(repr, known))}")
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        small = [tuple(p.shape) for p in added["params"] if p.ndim < 2]
        if added["muon"] and small:
            self.param_groups.pop()
            raise BadInput(
                f"Muon: a parameter of shape {small[0]} is no matrix: put it in a group with muon=False "
                "(muon_groups(model) makes the groups)"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step; `closure` computes the loss and its gradients anew.

        Raises:
            BadInput: a gradient is sparse.
        """
        loss = evaluate(closure)
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for p, gradient in trained("Muon", group):
                change = update(gradient, self.state[p], group)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"])
        return loss

    def _muon(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        names = ("momentum", "nesterov", "ns_steps", "coefficients", "eps", "scale", "precision")
        return muon(gradient, state["momentum_buffer"], **{name: group[name] for name in names})

    def _adam(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        options = {"betas": group["betas"], "eps": group["adam_eps"]}
        return adam(gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], **options)


CARD = Card(
    id="muon",
    title="Muon: An optimizer for hidden layers in neural networks",
    authors="Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein",
    year=2024,
    source="kellerjordan.github.io/posts/muon; scaling to language models: arXiv 2502.16982",
    family="optim",
    summary="Momentum made orthogonal by Newton-Schulz steps, for hidden matrices; AdamW for all other parameters.",
    objects={"Muon": "Optimizer"},
    use="Training transformers and convolutional networks from scratch in fewer steps than AdamW.",
    avoid="Fine-tuning what AdamW has trained, or a model that is mostly embeddings.",
    composes=("rmt_lr", "rmsnorm"),
    vectors=("muon",),
    code="KellerJordan/Muon, MIT",
    claim={
        "text": "With Muon a language model is, after 80 % of the steps, at least as good as with AdamW after all.",
        "metric": "bits per character",
        "direction": "lower",
        "margin": 0.0,
        "arms": ("adamw", "muon"),
        "seeds": 5,
        "minutes": 6,
        "task": "chars",
    },
)
