"""What a folder's `config.json` tells: the class to build, and whether we can work with it at all."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from laconic.errors import BadInput
from laconic.interop.checkpoints import METHODS
from laconic.pipeline.source_base import first_line

__all__ = ["model_class", "read_config", "read_json_config", "refuse_quantized", "set_dtype", "transformers_config"]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json` as a dict.

    Raises:
        BadInput: if it is missing or not JSON, or the folder is one that laconic or another tool compressed.
    """
    if (folder / "laconic.json").exists():
        raise _ours(folder)
    raw = read_json_config(folder)
    refuse_quantized(raw.get("quantization_config") or raw.get("compression_config"), folder)
    return raw


def read_json_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json` as a dict, whatever it says.

    Raises:
        BadInput: if it is missing or not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        adapter = " (it holds an adapter: merge it into its base model first)"
        raise BadInput(
            f"{folder} holds no config.json{adapter if (folder / 'adapter_config.json').exists() else ''}: "
            "give a Hugging Face model folder, or module:function for another model"
        )
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{file} is not a JSON object: download it again")
    return raw


def refuse_quantized(quantization: Any, where: object) -> None:
    """Refuse a model that another tool has quantized, naming the method.

    Raises:
        BadInput: if `quantization` is a quantization config.
    """
    if not quantization:
        return
    fields = quantization if isinstance(quantization, dict) else vars(quantization)
    method = fields.get("quant_method") or fields.get("quant_type") or "an unnamed method"
    method = getattr(method, "value", method)
    if method == "laconic":
        raise _ours(where)
    opens = "; laconic.load and laconic run open it as it is" if method in METHODS else ""
    raise BadInput(f"{where} is already quantized by another tool ({method}): give the original float model{opens}")


def _ours(where: object) -> BadInput:
    return BadInput(f"{where} is already compressed by laconic: give the original model, or use laconic.load")


def transformers_config(folder: Path, raw: dict[str, Any], trust_remote_code: bool) -> Any:
    """The transformers config object of a folder.

    Raises:
        BadInput: if its code is remote and not trusted, its type is unknown, or its values are refused.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, architecture = raw.get("model_type"), _architecture(raw)
    known = getattr(transformers, architecture or "", None)
    if kind not in CONFIG_MAPPING and known is None:
        _refuse_remote(folder, raw, trust_remote_code, f"the model type {kind!r}")
    try:
        if kind in CONFIG_MAPPING and "auto_map" not in raw:  # as AutoConfig would, without reading the file again
            return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(raw), name_or_path=str(folder))
        if kind in CONFIG_MAPPING or known is None:
            return transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        return known.config_class.from_dict(raw)
    except Exception as error:  # a config class may raise anything on values that it doesn't like
        raise BadInput(
            f"{folder / 'config.json'} is refused by transformers {transformers.__version__}: "
            f"{first_line(error)}"
        ) from error


def model_class(folder: Path, raw: dict[str, Any], config: Any, trust_remote_code: bool) -> type:
    """The class that `architectures` names, or the base model of the config where it names none.

    Raises:
        BadInput: if the class is unknown to transformers, or its code is remote and not trusted.
    """
    import transformers

    name = _architecture(raw)
    if name is None:
        found = transformers.AutoModel._model_mapping.get(type(config), None)
        if found is None:
            raise BadInput(
                f"{folder / 'config.json'} names no architecture and {type(config).__name__} has no default"
            )
        return found[0] if isinstance(found, (tuple, list)) else found
    found = getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    _refuse_remote(folder, raw, trust_remote_code, f"the architecture {name}")
    references = [value for value in raw["auto_map"].values() if str(value).endswith(f".{name}")]
    if not references:
        raise BadInput(f"{folder / 'config.json'}: auto_map does not say where the architecture {name} is")
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        return get_class_from_dynamic_module(references[0], folder, local_files_only=True)
    except Exception as error:  # the checkpoint's own code may raise anything
        raise BadInput(f"{folder}: the code of {name} cannot be loaded: {first_line(error)}") from error


def set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Write the dtype into a config and its parts, as `from_pretrained` does before it builds the model."""
    config.dtype = dtype
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            getattr(config, key).dtype = dtype


def _architecture(raw: dict[str, Any]) -> str | None:
    names = raw.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _refuse_remote(folder: Path, raw: dict[str, Any], trust_remote_code: bool, what: str) -> None:
    """Raise unless the folder brings code for `what` and the user trusts it."""
    import transformers

    if not isinstance(raw.get("auto_map"), dict):
        raise BadInput(
            f"{folder / 'config.json'}: {what} is unknown to transformers {transformers.__version__}: update "
            "transformers, or give the model as module:function"
        )
    if not trust_remote_code:
        raise BadInput(
            f"{folder / 'config.json'}: {what} needs code that comes with the checkpoint; read it, and pass "
            "--trust-remote-code (trust_remote_code=True) if you trust it"
        )
