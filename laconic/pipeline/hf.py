"""Artifacts through transformers: `AutoModel.from_pretrained(folder)` equals `laconic.load(folder)`.

Importing this module registers the quantizer; `laconic._hooks` does so as soon as transformers is there. The
records come from `config.json` (`quantization_config.records`), so config and weights alone make a loadable
folder, also after `save_pretrained`. transformers itself would leave what it does not find at random values;
here a record that fits no module of the class, and a tensor that the file lacks, are errors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from laconic.core.lora import freeze_but_adapters_
from laconic.core.record import (
    ADAPT,
    CACHE,
    FOLD,
    FOLD_AFFINE,
    FUSE,
    PACK,
    RENORM,
    Record,
    apply_records,
    records_of,
)
from laconic.errors import BadInput
from laconic.nn import declare_alias, is_packed, packed_specs, storage_names
from laconic.pipeline.artifact import (
    METHOD,
    VERSION,
    check_filled,
    float_path,
    quantization_config,
    records_from_json,
)
from laconic.pipeline.source_weights import few
from laconic.pipeline.tensorfile import TensorReader

__all__ = [
    "LaconicConfig", "LaconicQuantizer", "attach", "fit_records", "mark_filled", "settle_ties",
]  # fmt: skip


class LaconicConfig(QuantizationConfigMixin):
    """`quantization_config` of an artifact's `config.json`.

    Args:
        version: of the artifact's format.
        records: what was done to the model, in order, as JSON.
        others: the rest (compressed-tensors' description), kept as it is.
    """

    def __init__(self, version: int = VERSION, records: Iterable[dict[str, Any]] = (), **others: Any):
        others.pop("quant_method", None)
        self.quant_method = METHOD
        self.version = version
        self.records = list(records)
        for key, value in others.items():
            setattr(self, key, value)


class LaconicQuantizer(HfQuantizer):
    """Packs the modules of a model on meta, so that transformers fills them from the file."""

    quantization_config: LaconicConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what this version cannot load, before anything is built."""
        if not self.pre_quantized:
            raise BadInput("from_pretrained does not compress: run laconic compress, and load the folder it writes")
        if self.quantization_config.version != VERSION:
            raise BadInput(
                f"config.json has version {self.quantization_config.version!r} of laconic's format and this "
                f"laconic reads version {VERSION}: update laconic"
            )

    def preprocess_model(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Pack the skeleton; `dtype` is what the model will compute in."""
        self._dtype = dtype  # which the method below is not told
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        records = records_from_json(self.quantization_config.records, "config.json")
        model.eval()  # as it will be; a batch norm in training mode cannot be folded
        self._fitted = fit_records(model, records)
        apply_records(model, self._fitted)
        settle_ties(model)
        _set_kept_dtypes(model, self._dtype)
        mark_filled(model)
        # Alignment bytes of the file, which are no one's tensors.
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"^__pad_\d+$"}
        self._kept = {name for path, spec in packed_specs(model).items() for name in storage_names(path, spec).values()}
        if kwargs.get("checkpoint_files"):
            stored = [r.path for r in records if r.action == PACK]
            _check_stored(model, stored, [Path(file) for file in kwargs["checkpoint_files"]])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_filled(model)
        if any(record.action == ADAPT for record in self._fitted):
            freeze_but_adapters_(model)
        attach(model, self._fitted, self)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Packed tensors stay as they are stored, scales included; everything else is cast as ever."""
        if any(name in self._kept for name in converter._original_target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list, model: Any) -> list:
        """None: the names in the file are those of the module, and experts are fused already."""
        return []

    def is_serializable(self) -> bool:
        """`save_pretrained` writes packed tensors and, in config.json, the records."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top, since every op has an input gradient; packed weights cannot."""
        return True


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(LaconicConfig)
    register_quantizer(METHOD)(LaconicQuantizer)


def attach(model: Any, records: Iterable[Record], quantizer: HfQuantizer | None = None) -> None:
    """Give a model what transformers expects on a quantized one, with the records as its class has them.

    Args:
        model: a transformers model with packed modules.
        records: what was applied to it.
        quantizer: the one that loaded it; a new one by default.
    """
    records = list(records)
    before = [record for record in records if record.action in (FOLD, FOLD_AFFINE, RENORM)]
    after = [record for record in records if record.action in (FUSE, CACHE)]
    config = LaconicConfig(**quantization_config(model, [*before, *records_of(model), *after]))
    if quantizer is None:
        quantizer = LaconicQuantizer(config, pre_quantized=True)
    quantizer.quantization_config = config
    model.config.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model._weight_conversions = []  # save_pretrained must not split experts or rename anything


# --- from the records of the saved class to the class that is loaded ----------------------------------------


def fit_records(model: Any, records: Iterable[Record]) -> list[Record]:
    """The records with their paths as the class of `model` has them: with or without the base model's prefix.

    Records of a head that the class lacks are left out; one inside the base model must fit.

    Raises:
        BadInput: a record belongs to the base model and fits no module of it.
    """
    records, fitted = list(records), []
    adapted = {record.path for record in records if record.action == ADAPT}
    for record in records:
        if record.action == CACHE:
            fitted += [record] if model.can_generate() else []
            continue
        if record.action in (FOLD_AFFINE, RENORM):
            fitted += _fit_norms(model, record)
            continue
        packs = record.action == PACK
        path = _fitted(model, record.path, packs, adapted)
        data = dict(record.data)
        others = data.get("aliases", ()) if packs else (data["norm"],) if record.action == FOLD else ()
        found = [name for other in others if (name := _fitted(model, other, packs, adapted)) is not None]
        if path is None and found:
            raise BadInput(
                f"{type(model).__name__} has {found[0]}, which goes with {record.path}, and lacks that: load "
                "the folder with the class that its config.json names"
            )
        if path is not None:
            data.update({"aliases": found} if packs else {"norm": found[0]} if found else {})
            fitted.append(Record(record.action, path, data))
    return fitted


def _fit_norms(model: Any, record: Record) -> list[Record]:
    """A record of norms that were folded or taken apart, likewise; nothing where all of it lies in a missing head."""

    def module(path: str) -> str | None:
        return _fitted(model, path, False)

    def parameter(name: str) -> str | None:
        # By its module: the parameter may be a bias that is not there yet.
        path, _, attribute = name.rpartition(".")
        found = module(path)
        return None if found is None else f"{found}.{attribute}"

    data = dict(record.data)
    if record.action == FOLD_AFFINE:
        layers = [{**layer, "path": path} for layer in data["layers"] if (path := module(layer["path"])) is not None]
        norm = module(record.path)
        return [] if norm is None else [Record(record.action, norm, {**data, "layers": layers})]
    for key, fit in (("norms", module), ("shapes", parameter)):
        data[key] = {name: said for path, said in data.get(key, {}).items() if (name := fit(path)) is not None}
    if "untie" in data:
        data["untie"] = [name for path in data["untie"] if (name := parameter(path)) is not None]
        data["untied"] = parameter(data["untied"])
    changes = data["norms"] or data["shapes"] or data.get("untie")
    return [Record(record.action, parameter(record.path) or record.path, data)] if changes else []


def _fitted(model: Any, path: str, parameter: bool, adapted: Collection[str] = ()) -> str | None:
    """The path of a parameter, or else a module, as `model` has it; None if `model` lacks the head it is in.

    A parameter of a layer that gets an adapter has a path that is not there yet.
    """
    if parameter and (before := float_path(path, adapted)) != path:
        layer, _, name = (_fitted(model, before, True) or "").rpartition(".")
        return f"{layer}.base.{name}" if layer else None
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    inner = path.removeprefix(prefix)
    for candidate in dict.fromkeys((path, inner, prefix + path)):
        if _has(model, candidate, parameter):
            return candidate
    base = getattr(model, model.base_model_prefix, None) if prefix else None
    base = base if isinstance(base, nn.Module) else model
    # A head, and a part that this class does without (a pooler), is no child of the base model here.
    if base._modules.get(inner.partition(".")[0]) is not None:
        raise BadInput(
            f"config.json records that {path} was changed, and {type(model).__name__} has no such part: the "
            "config does not belong to these weights, or the class is another"
        )
    return None


def _has(model: nn.Module, path: str, parameter: bool) -> bool:
    owner, _, name = path.rpartition(".") if parameter else (path, "", "")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return False
    return not parameter or module._parameters.get(name) is not None


def settle_ties(model: Any) -> None:
    """Take packed parameters out of transformers' table of ties: their aliases hold no tensors to be tied.

    A parameter that this class ties to a packed one, and the records do not know (a head on top of a packed
    base model), becomes an alias as well.
    """
    ties = model.all_tied_weights_keys
    again = True
    while again:
        again = False
        for target, source in list(ties.items()):
            packed = [_packed_owner(model, name) for name in (target, source)]
            if packed == [None, None]:
                continue
            for name, own, other in ((target, *packed), (source, *packed[::-1])):
                if own is None:
                    path, _, attribute = name.rpartition(".")
                    declare_alias(model.get_submodule(path), attribute, *other)
            del ties[target]
            again = True


def _packed_owner(model: nn.Module, path: str) -> tuple[nn.Module, str] | None:
    """The module and attribute that hold the tensors behind a packed parameter; None for a float one."""
    owner, _, name = path.rpartition(".")
    module: Any = model.get_submodule(owner)
    if not is_packed(module) or name not in module._packed:
        return None
    return module._packed_owner.get(name, (module, name))


def _set_kept_dtypes(model: Any, dtype: torch.dtype | None) -> None:
    """Compute type of packed parameters in parts that transformers keeps in float32, whatever the model's."""
    from transformers.core_model_loading import build_glob_alternation

    kept = model._get_dtype_plan(dtype) if dtype is not None else {}
    if not kept:
        return
    pattern, of_group, _ = build_glob_alternation(list(kept))
    for path, module in model.named_modules():
        if is_packed(module):
            for name in module._packed:
                if match := pattern.search(f"{path}.{name}"):
                    object.__setattr__(module, "_packed_dtype", kept[of_group[match.lastgroup]])


def mark_filled(model: nn.Module) -> None:
    """Keep transformers from initialising packed weights: it would dequantize each, and fill the copy.

    A module with a buffer that no file holds (an embedding's factor) is still initialised.
    """
    for module in model.modules():
        if is_packed(module) and not module._non_persistent_buffers_set:
            module._is_hf_initialized = True


# --- nothing is left at random values -----------------------------------------------------------------------


def _check_stored(model: Any, stored: Iterable[str], files: list[Path]) -> None:
    """Whether the weight files hold every tensor of every packed parameter, as the spec says.

    The class that was saved has to find all others as well; another one may bring a head of its own.

    Raises:
        BadInput: naming the first that is missing or different.
    """
    specs = {}
    for file in files:
        with TensorReader(file) as reader:
            specs.update({name: reader.spec(name) for name in reader.names()})
    prefix = f"{model.base_model_prefix}."
    known = set(stored)
    for path, spec in packed_specs(model).items():
        spellings = [name for name in (path, path.removeprefix(prefix), prefix + path) if name in known]
        for suffix, expected in spec.tensors().items():
            name = f"{spellings[0]}_{suffix}"
            if specs.get(name) != expected:
                found = f"{specs[name][0]} of shape {specs[name][1]}" if name in specs else "nothing"
                raise BadInput(
                    f"{files[0].name} holds {found} as {name}, where config.json records {expected[0]} of "
                    f"shape {expected[1]}: the folder is damaged or was changed, copy it again"
                )
    if type(model).__name__ not in (model.config.architectures or ()):
        return
    ties = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    lacking = [name for name in model.state_dict() if name not in specs and name not in ties]
    if lacking:
        raise BadInput(
            f"{files[0].name} lacks {few(lacking)} of {type(model).__name__}: the folder is damaged or was "
            "changed, copy it again"
        )
