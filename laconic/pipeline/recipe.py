"""A recipe: the ordered passes of a compression and their options, as YAML that can be read and run again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from laconic.errors import BadInput
from laconic.numerics import Scheme

from .units import BITS

# Stages in the only order that keeps what each needs; a pass declares its stage, a recipe is checked against them.
STAGES = {"fold_batchnorm": ("fold and clean", 0), "quantize": ("quantize", 3)}


class FoldBatchNorm(BaseModel):
    """Fold batch norms into the convolution or linear layer before them."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["fold_batchnorm"] = Field("fold_batchnorm", alias="pass")


class Quantize(BaseModel):
    """Pack parameters. `units`, where given, fixes every scheme (null: left as it is); else bits are allocated."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    action: Literal["quantize"] = Field("quantize", alias="pass")
    method: Literal["gptq", "rtn"] = "gptq"
    bits: list[int] = list(BITS)
    units: dict[str, str | None] | None = None

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: list[int]) -> list[int]:
        if not bits or not set(bits) <= set(BITS):
            raise ValueError(f"bits are some of {list(BITS)}")
        return bits

    @field_validator("units")
    @classmethod
    def _parsing_schemes(cls, units: dict[str, str | None] | None) -> dict[str, str | None] | None:
        for text in (units or {}).values():
            if text is not None:
                Scheme.parse(text)
        return units


Pass = Annotated[FoldBatchNorm | Quantize, Field(discriminator="action")]


class Recipe(BaseModel):
    """Passes in order."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    passes: list[Pass] = [FoldBatchNorm(), Quantize()]

    @field_validator("passes")
    @classmethod
    def _in_order(cls, passes: list[FoldBatchNorm | Quantize]) -> list[FoldBatchNorm | Quantize]:
        last, names = -1, []
        for step in passes:
            stage, place = STAGES[step.action]
            if step.action in names:
                raise ValueError(f"{step.action} stands twice")
            if place < last:
                raise ValueError(
                    f"{step.action} ({stage}) stands after {names[-1]}: folding needs float weights, so it comes first"
                )
            last = place
            names.append(step.action)
        return passes

    @property
    def fold(self) -> bool:
        return any(isinstance(step, FoldBatchNorm) for step in self.passes)

    @property
    def quantize(self) -> Quantize | None:
        return next((step for step in self.passes if isinstance(step, Quantize)), None)

    def with_units(self, decision: dict[str, Scheme | None], method: str) -> Recipe:
        """The same recipe with every choice written out."""
        step = self.quantize or Quantize()
        units = {name: str(s) if s is not None else None for name, s in decision.items()}
        fixed = step.model_copy(update={"units": units, "method": method})
        return Recipe(passes=[p for p in self.passes if isinstance(p, FoldBatchNorm)] + [fixed])

    def to_yaml(self) -> str:
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
