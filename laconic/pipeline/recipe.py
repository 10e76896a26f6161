"""A recipe: the ordered passes of a compression and their options, as YAML that can be read and run again."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from laconic.core.passes import STAGES as ORDER
from laconic.core.passes import Stage, misplaced
from laconic.core.units import BITS
from laconic.errors import BadInput
from laconic.numerics import Scheme

STAGES: dict[str, Stage] = {
    "fold_batchnorm": "fold", "smoothquant": "rewrite", "awq": "rewrite", "rotate": "rewrite", "quantize": "quantize",
    "bias_correction": "repair", "norm_tweak": "repair", "kv_cache": "cache", "fuse_blocks": "export",
}  # fmt: skip

Inputs = Literal["auto", "float", "int8", "int8_static"]
Method = Literal["gptq", "rtn", "awq", "rsq", "adaquant", "genie"]
LEARNED: tuple[Method, ...] = ("adaquant", "genie")  # methods that train how weights round, layer by layer


class FoldBatchNorm(BaseModel):
    """Fold batch norms into the convolution or linear layer before them."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["fold_batchnorm"] = Field("fold_batchnorm", alias="pass")


class SmoothQuant(BaseModel):
    """Move outliers of activations from norms into the weights that read them. Needs data."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["smoothquant"] = Field("smoothquant", alias="pass")
    alpha: float = Field(0.5, ge=0, le=1)


class AWQ(BaseModel):
    """Scale up the weight columns that meet large activations, and take that back in the norm before. Needs data.

    `scheme` is what the search for the scales rounds by.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["awq"] = Field("awq", alias="pass")
    scheme: str = "v1/int4/group128/float16/minmax/zint/nearest"
    grid: int = Field(20, ge=1)

    @field_validator("scheme")
    @classmethod
    def _parsing(cls, scheme: str) -> str:
        return str(Scheme.parse(scheme))


class Rotate(BaseModel):
    """Turn residual streams and values by orthogonal matrices, which spreads outliers and changes nothing else.

    `heads` and `ffn` turn inputs of layers as they come, which costs time in every forward.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["rotate"] = Field("rotate", alias="pass")
    kind: Literal["hadamard", "orthogonal"] = "hadamard"
    stream: bool = True
    value: bool = True
    heads: bool = False
    ffn: bool = False


class NormTweak(BaseModel):
    """Train the norms of each block until its channels have the statistics that they had. Needs data; kept where the
    select split does not get worse by it."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["norm_tweak"] = Field("norm_tweak", alias="pass")
    lr: float = Field(1e-5, gt=0)
    lr_scale: float = Field(5.0, ge=0)
    iters: int = Field(1, ge=1)


class BiasCorrection(BaseModel):
    """Let biases take up the mean of what rounding changed; kept where the select split does not get worse by it."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["bias_correction"] = Field("bias_correction", alias="pass")


class FuseBlocks(BaseModel):
    """Run transformer blocks whose linear layers are packed as compiled code; their results are the same to rounding."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["fuse_blocks"] = Field("fuse_blocks", alias="pass")


class KVCache(BaseModel):
    """Let `generate` pack its keys and values; both bits null: floats, as ever.

    `group` are the numbers that share a scale, null a whole head. `key_axis` null is "channel" at 2 bits. The method
    rotatekv rotates them first and sorts the channels of keys, for models with rotary positions; it needs data.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["kv_cache"] = Field("kv_cache", alias="pass")
    method: Literal["plain", "rotatekv"] = "plain"
    key_bits: Literal[8, 4, 2] | None = 4
    value_bits: Literal[8, 4, 2] | None = 4
    group: int | None = Field(None, ge=1)
    residual: int = Field(32, ge=0)
    key_axis: Literal["token", "channel"] | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> KVCache:
        if (self.key_bits is None) != (self.value_bits is None):
            raise ValueError("keys and values are both packed, or neither: give both bits, or null for both")
        return self


class Quantize(BaseModel):
    """Pack parameters. `units`, where given, fixes every scheme (null: left as it is); else bits are allocated.

    `method` rounds them: `rtn` to nearest; by the second moments of the inputs `gptq`, `rsq` (tokens counted by how much
    attention they get) and `awq` (ranges clipped); `adaquant` and `genie` train how each layer rounds, for `steps` of
    Adam. Where there is no data, all of them are `rtn`. `schemes` are offered instead of integers of `bits` bits. `allocate`
    gives them out: `program` by measured costs under the ceilings, `uniform` the same width to all, `blocks` by the
    importance of whole blocks, `bisect` along an order of sensitivity, measuring whether the drop holds.

    `inputs` says whether packed linear layers round their inputs to 8 bits when they run, which lets them take integer
    products: each token by a scale of its own (int8), or all by one scale that is calibrated before (int8_static, which
    needs data). auto rounds tokens, and only where a latency ceiling cannot be kept otherwise.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["quantize"] = Field("quantize", alias="pass")
    method: Method = "gptq"
    bits: list[int] = list(BITS)
    schemes: list[str] | None = None
    allocate: Literal["program", "uniform", "blocks", "bisect"] = "program"
    steps: int = Field(500, ge=1)
    inputs: Inputs = "auto"
    units: dict[str, str | None] | None = None

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: list[int]) -> list[int]:
        if not bits or not set(bits) <= set(BITS):
            raise ValueError(f"bits are some of {list(BITS)}")
        return bits

    @field_validator("schemes")
    @classmethod
    def _some_schemes(cls, schemes: list[str] | None) -> list[str] | None:
        if schemes is not None and not schemes:
            raise ValueError("an empty list of schemes offers nothing: leave it out, or name one")
        return None if schemes is None else [str(Scheme.parse(text)) for text in schemes]

    @model_validator(mode="after")
    def _fitting_schemes(self) -> Quantize:
        if self.schemes is not None and self.method in LEARNED:
            raise ValueError(f"{self.method} learns integers with a scale for each row: leave schemes out")
        return self

    @field_validator("units")
    @classmethod
    def _parsing_schemes(cls, units: dict[str, str | None] | None) -> dict[str, str | None] | None:
        for text in (units or {}).values():
            if text is not None:
                Scheme.parse(text)
        return units


Rewrite = SmoothQuant | AWQ | Rotate
Step = FoldBatchNorm | SmoothQuant | AWQ | Rotate | Quantize | BiasCorrection | NormTweak | KVCache | FuseBlocks
Pass = Annotated[Step, Field(discriminator="action")]


class Recipe(BaseModel):
    """Passes in order."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    passes: list[Pass] = [FoldBatchNorm(), Quantize(), BiasCorrection(), FuseBlocks()]

    @field_validator("passes")
    @classmethod
    def _in_order(cls, passes: list[Step]) -> list[Step]:
        wrong = misplaced([(step.action, STAGES[step.action]) for step in passes])
        if wrong:
            raise ValueError(wrong)
        return passes

    @property
    def fold(self) -> bool:
        """Whether batch norms are folded."""
        return any(isinstance(step, FoldBatchNorm) for step in self.passes)

    @property
    def rewrites(self) -> list[Rewrite]:
        """What changes the float model, and not what it computes, before anything is rounded."""
        return [step for step in self.passes if isinstance(step, (SmoothQuant, AWQ, Rotate))]

    @property
    def norm_tweak(self) -> NormTweak | None:
        """How norms are trained after rounding, or None."""
        return next((step for step in self.passes if isinstance(step, NormTweak)), None)

    @property
    def correct_biases(self) -> bool:
        """Whether biases take up the mean of rounding errors."""
        return any(isinstance(step, BiasCorrection) for step in self.passes)

    @property
    def fuse(self) -> bool:
        """Whether transformer blocks run as compiled code."""
        return any(isinstance(step, FuseBlocks) for step in self.passes)

    @property
    def quantize(self) -> Quantize | None:
        """How parameters are packed, or None."""
        return next((step for step in self.passes if isinstance(step, Quantize)), None)

    @property
    def kv_cache(self) -> KVCache | None:
        """How keys and values are packed, or None where the recipe does not say."""
        return next((step for step in self.passes if isinstance(step, KVCache)), None)

    def with_cache(self, step: KVCache) -> Recipe:
        """The same recipe with this cache, before what is done for export."""
        return Recipe(passes=[p for p in self.passes if not isinstance(p, KVCache)]).with_passes(step)

    def with_units(
        self, decision: dict[str, Scheme | None], method: str, dropped: Collection[str] = (), inputs: Inputs = "float"
    ) -> Recipe:
        """The same recipe with every choice written out, without the passes whose work was not kept."""
        step = self.quantize or Quantize()
        units = {name: str(s) if s is not None else None for name, s in decision.items()}
        fixed = step.model_copy(update={"units": units, "method": method, "inputs": inputs})
        kept = [p for p in self.passes if p.action not in dropped]
        return Recipe(passes=[fixed if isinstance(p, Quantize) else p for p in kept])

    def with_passes(self, *added: Step, **quantize: Any) -> Recipe:
        """The same recipe with further passes, each at the end of its stage, and other options of `quantize`."""
        passes = [p.model_copy(update=quantize) if isinstance(p, Quantize) else p for p in self.passes]
        return Recipe(passes=sorted([*passes, *added], key=lambda p: ORDER.index(STAGES[p.action])))

    def to_yaml(self) -> str:
        """The text that `load_recipe` reads."""
        return yaml.safe_dump(self.model_dump(by_alias=True), sort_keys=False, width=200)


def load_recipe(recipe: Recipe | str | os.PathLike[str] | None) -> Recipe:
    """A recipe from a YAML file (or as given).

    Raises:
        BadInput: the file is missing, no YAML, or no recipe; with the place.
    """
    if recipe is None:
        return Recipe()
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, (str, os.PathLike)):
        raise BadInput(
            f"a recipe is a Recipe or a YAML file, not a {type(recipe).__name__}: Recipe.model_validate makes one of a dict"
        )
    path = Path(recipe)
    try:
        data: Any = yaml.safe_load(path.read_text())
        return Recipe.model_validate(data)
    except OSError as error:
        raise BadInput(f"the recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"the recipe {path} is no text: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"the recipe {path} is no YAML: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"the recipe {path} does not hold at {where or 'its top'}: {first['msg']}") from error
