"""LoRA in PEFT's terms: which layers carry it, and adapter folders in and out."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba,
    check_target_module_exists,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from rolora.algorithm.adapter import LARGEST, AdapterState, Specs, TensorSpec, layer_of, role_of
from rolora.algorithm.factors import to_peft
from rolora.errors import ConfigError, one_line
from rolora.files import new_folder
from rolora.model.bank import PREFIX
from rolora.model.probe import NEVER

Kind = Literal["classification", "multi_label", "regression", "causal_lm"]
WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "model_config.json"
_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoraSettings:
    """Where and how large the adapters are. ``layers``: "all", "top:k", or layer indices.

    ``target_modules`` are names, "all-linear", or a regular expression that a whole path matches;
    empty means PEFT's default for the architecture. The scaling is
    alpha / rank, or alpha / √rank with ``rslora`` (Kalajdzievski 2023).
    """

    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ()
    layers: str | tuple[int, ...] = "all"
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor in front of lora_B @ lora_A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def peft_config(
    model: Any,
    kind: Kind,
    settings: LoraSettings,
    head_layers: Sequence[str],
    unfit: Mapping[str, str],
) -> tuple[Any, list[str]]:
    """The peft.LoraConfig of an adapter on ``model``, and the dotted paths that it selects.

    It names the base by its hub name, or by an absolute path, which is right from any folder.
    ``unfit``: why a layer cannot carry per-client adapters, by path. Raises ConfigError where PEFT
    has no default target modules, and for each name that selects nothing or what cannot be adapted.
    """
    place = model.name_or_path
    usable = linear_layers(model, head_layers)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        modules_to_save=sorted(
            {p.split(".")[0] if above_encoder(model, p) else p for p in head_layers}
        )
        or None,
        task_type="CAUSAL_LM" if kind == "causal_lm" else "SEQ_CLS",
        base_model_name_or_path=str(Path(place).resolve()) if Path(place).exists() else place,
        inference_mode=True,
    )
    config.layers_to_transform = _layer_indices(settings.layers, model.config)
    given = settings.target_modules
    if given in ("all-linear", ("all-linear",)):
        _choose_all(config, usable, unfit)
    elif given:
        config.target_modules = given if isinstance(given, str) else {*given}
        if isinstance(given, str) and config.layers_to_transform:
            raise ConfigError(
                "lora.layers goes with names in lora.target_modules, not with a regular "
                "expression: remove it, and let the expression choose the layers"
            )
        try:
            if isinstance(given, str):
                _require_quick(given)
            _refuse_names(model, config, usable)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"lora.target_modules = {given[:80]!r} cannot be used as a regular expression: "
                f"{one_line(error)}"
            ) from None
    else:
        config.target_modules = _default(model, usable, unfit)
    layers = _selected(config, usable)
    if not layers:
        raise ConfigError(
            f"lora.layers = {_shown(settings.layers)} and lora.target_modules select no layer; "
            f"this model has {_listed(usable)}"
        )
    for path in layers:
        if path in unfit:
            fit = _names(usable) - _names(unfit)
            way = f"set lora.target_modules to some of {', '.join(sorted(fit))}"
            raise ConfigError(
                f"layer {path!r} {unfit[path]}, so it cannot carry per-client adapters: "
                + (way if fit else "no layer of this model can; use another model")
            )
    conv = transformers.pytorch_utils.Conv1D
    config.fan_in_fan_out = any(isinstance(model.get_submodule(p), conv) for p in layers)
    return config, layers


def _selected(config: Any, paths: Iterable[str]) -> list[str]:
    """The modules among these that PEFT puts an adapter on."""
    return [path for path in paths if check_target_module_exists(config, path)]


def _choose_all(config: Any, usable: Sequence[str], unfit: Mapping[str, str]) -> None:
    """All linear layers, by name if that selects just these, so that lora.layers is kept as it is.

    A layer that is never called has no effect, with an adapter or without.
    """
    called = [path for path in usable if unfit.get(path) != NEVER]
    config.target_modules = {path.rpartition(".")[2] for path in called}
    chosen = _selected(config, called)
    if chosen != _selected(config, usable):
        config.target_modules, config.layers_to_transform = {*chosen}, None


def _refuse_names(model: Any, config: Any, usable: Sequence[str]) -> None:
    """ConfigError for a name, or an expression, that selects nothing or more than linear layers."""
    modules = dict(model.named_modules())
    given = config.target_modules
    for name in [given] if isinstance(given, str) else sorted(given):
        alone = copy.copy(config)
        alone.target_modules = name if isinstance(given, str) else {name}
        found = _selected(alone, [path for path in modules if path])
        if beyond := [path for path in found if path not in usable]:
            raise ConfigError(
                f"lora.target_modules: {name!r} selects {beyond[0]}, {_role(model, beyond[0])}: "
                f"use {_listed(usable)}"
            )
        if found:
            continue
        alone.modules_to_save = alone.layers_to_transform = None
        heads = [path for path in _selected(alone, modules) if path not in usable]
        if heads and above_encoder(model, heads[0]):
            raise ConfigError(
                f"lora.target_modules: {name!r} is part of the task head, which is trained whole "
                f"(model.head): use {_listed(usable)}"
            )
        if isinstance(given, str):
            raise ConfigError(
                f"lora.target_modules: no layer's whole path matches {name!r}; for names write a "
                f"list: this model has {_listed(usable)}"
            )
        within = "" if config.layers_to_transform is None else " in the layers of lora.layers"
        raise ConfigError(
            f"lora.target_modules: no layer is named {name!r}{within}; this model has "
            f"{_listed(usable)}"
        )


def _role(model: Any, path: str) -> str:
    """What a module is that cannot carry LoRA here."""
    module = model.get_submodule(path)
    if module is model.get_output_embeddings():
        return "the output embedding, which stays as it is"
    if _refused_by_peft(model, path):
        return f"on which PEFT puts no adapter in a {model.config.model_type!r}"
    return f"a {type(module).__name__}, which cannot carry LoRA here"


_ATTENTION = re.compile(
    r"(q|v|query|value|qkv|wqkv|query_key_value|c_attn)(_proj|_lin|_head)?", re.IGNORECASE
)


def _default(model: Any, usable: Sequence[str], unfit: Mapping[str, str]) -> Any:
    """PEFT's own target modules for this architecture. ConfigError with some if it has none."""
    architecture = model.config.model_type
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(architecture)
    if known:
        return known if isinstance(known, str) else {*known}
    names = sorted(_names(usable) - _names(unfit))
    if not names:
        raise ConfigError(
            f"no layer of {architecture!r} can carry per-client adapters: use another model"
        )
    some = [name for name in names if _ATTENTION.fullmatch(name)] or names[:1]
    raise ConfigError(
        f"PEFT has no default target_modules for {architecture!r}: set lora.target_modules, for "
        f'example to {json.dumps(some)}, or to "all-linear" ({", ".join(names)})'
    )


def _names(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(sorted(_names(paths)))


def _shown(layers: str | tuple[int, ...]) -> str:
    return repr(layers if isinstance(layers, str) else list(layers))


def above_encoder(model: Any, path: str) -> bool:
    """Whether a module is part of the task head that transformers puts on its pre-trained model."""
    return not f"{path}.".startswith(f"{model.base_model_prefix}.")


def _layer_indices(layers: str | tuple[int, ...], config: Any) -> list[int] | None:
    if layers == "all":
        return None
    depth = int(config.num_hidden_layers)
    if isinstance(layers, str):
        top = layers.removeprefix("top:")
        if not top.isdigit() or not 0 < int(top) <= depth:
            raise ConfigError(
                f"lora.layers = {layers!r}: use 'all', 'top:1'..'top:{depth}', or a list"
            )
        return list(range(depth - int(top), depth))
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise ConfigError(f"lora.layers = {list(layers)}: the model's layers are 0..{depth - 1}")
    return sorted(layers)


def linear_layers(model: Any, head_layers: Sequence[str]) -> list[str]:
    """Linear layers that may carry LoRA.

    Not the task head, the output embedding, or what PEFT refuses (a Mamba's output projection).
    """
    output = model.get_output_embeddings()
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [
        path
        for path, module in model.named_modules()
        if (isinstance(module, kinds) or "Linear" in type(module).__name__)
        and path not in head_layers
        and module is not output
        and not _refused_by_peft(model, path)
    ]


def _refused_by_peft(model: Any, path: str) -> bool:
    try:
        _check_lora_target_modules_mamba(peft.LoraConfig(), model, path.rpartition(".")[2])
    except ValueError:
        return True
    return False


def save_adapter(
    folder: Path,
    adapter: AdapterState,
    config: Any,
    model_config: Any,
    tokenizer: Any,
    notes: Mapping[str, Any],
    card: str,
) -> None:
    """Write a PEFT adapter folder, whole or not at all.

    Cores and deltas go into the factors, so ranks may differ from layer to layer. Beside PEFT's two
    files the folder holds the tokenizer, ``README.md`` (``card``), ``rolora.json`` (``notes``) and
    ``model_config.json``: the base's configuration with the run's labels. Called config.json, it
    would make loaders take the folder for a whole model.
    """
    plain = to_peft(adapter)
    if plain is not adapter:
        config = _with_ranks(config, plain)
    with new_folder(folder, replace=True) as part:
        config.save_pretrained(str(part))
        tensors = {name: tensor.contiguous() for name, tensor in plain.items()}
        # not save_file, whose error for a full disk is not an OSError
        (part / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        model_config.to_json_file(part / MODEL_CONFIG)
        _save_tokenizer(tokenizer, part)
        (part / "rolora.json").write_text(json.dumps(dict(notes), indent=2) + "\n")
        (part / "README.md").write_text(card, encoding="utf-8")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save it without what its last call was asked to truncate and pad to. OSError if it cannot."""
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        fast.no_truncation()
        fast.no_padding()
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # the tokenizers library raises a bare Exception that ends like this
        if found := re.search(r"\(os error (\d+)\)$", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error
        raise


def _with_ranks(config: Any, adapter: AdapterState) -> Any:
    """The peft.LoraConfig with this adapter's rank for each layer, and the same scaling."""
    changed = copy.deepcopy(config)
    for layer, scaling in adapter.scaling.items():
        path, rank = layer.removeprefix(PREFIX), adapter[f"{layer}.lora_A.weight"].shape[0]
        changed.rank_pattern[f"^{re.escape(path)}$"] = rank
        changed.alpha_pattern[f"^{re.escape(path)}$"] = scaling * (
            rank**0.5 if config.use_rslora else rank
        )
    return changed


def read_adapter(folder: Path, specs: Specs, *, any_rank: bool = False) -> AdapterState:
    """The tensors of a PEFT adapter folder that fits ``specs``; it may lack the head.

    Each layer's product is the adapter's own: lora_B is multiplied by the adapter's scaling over
    that of ``specs``. ``any_rank``: each layer may have a rank of its own. Only safetensors is
    read. Raises ConfigError naming the first tensor that does not fit, or a key of
    adapter_config.json that asks for more than lora_B @ lora_A.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise ConfigError(
            f"{folder} is not a PEFT adapter with safetensors weights: {WEIGHTS} is missing"
        )
    config = _plain_lora(folder)
    expected = {spec.name: spec for spec in specs.tensors}
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
            for name, spec in expected.items():
                if name not in shapes and spec.role == "head":
                    continue
                wanted = _with_rank(spec, shapes) if any_rank else spec.shape
                if shapes.get(name) != wanted:
                    raise ConfigError(
                        f"{folder} does not fit: {name} is {shapes.get(name, 'missing')}, "
                        f"expected {wanted} (rank, target_modules and layers must be the same)"
                    )
            if extra := sorted(shapes.keys() - expected.keys()):
                key = "modules_to_save" if role_of(extra[0]) == "head" else "target_modules"
                raise ConfigError(
                    f"{folder} does not fit: it also holds {extra[0]} (see {key} in its "
                    f"{_CONFIG}): nothing of this run takes it"
                )
            tensors = {name: stored.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise ConfigError(f"{file} is damaged: {one_line(error)}") from error
    if odd := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise ConfigError(f"{folder} does not fit: {odd[0]} has dtype {tensors[odd[0]].dtype}")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    scaling = _scaling(folder, config)
    for layer, ours in specs.scaling.items():
        rank = len(tensors[f"{layer}.lora_A.weight"])
        theirs = scaling(layer.removeprefix(PREFIX), rank)
        if theirs is None:
            raise ConfigError(f"{folder} is damaged: {layer} has another rank in its {_CONFIG}")
        if not math.isclose(theirs, ours, rel_tol=1e-12):
            tensors[f"{layer}.lora_B.weight"] *= theirs / ours
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ConfigError(
                f"{folder} has values in {name} that are not finite: its training has diverged, or "
                "it is damaged"
            )
    return AdapterState(tensors, specs.scaling)


def _with_rank(spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a factor, with the rank that its layer's lora_A has in ``shapes``."""
    rank = (*shapes.get(f"{layer_of(spec.name)}.lora_A.weight", ()), 0)[0]
    if not rank or spec.role not in ("A", "B"):
        return spec.shape
    return (rank, spec.shape[1]) if spec.role == "A" else (spec.shape[0], rank)


# Keys of adapter_config.json that do not change what an adapter computes from its tensors
_NO_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config"),
}
# ... that the tensors' names and shapes show
_SHOWN = {
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern",),
}
_SCALING = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# ... and the starts that leave the base's weights as they are
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def _plain_lora(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, over PEFT's defaults.

    ConfigError for a key with an effect beyond the factors, their scaling and whole modules.
    """
    file = folder / _CONFIG
    try:
        stored = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} is missing or damaged: {one_line(error)}") from None
    usual = peft.LoraConfig().to_dict()
    if (kind := str(stored.get("peft_type", "LORA"))) != "LORA":
        raise ConfigError(f"{folder} is a {kind} adapter (peft_type); only LORA can be read")
    for key, value in stored.items():
        if key in _NO_EFFECT | _SHOWN | _SCALING | {"peft_type"} or value == usual.get(key):
            continue
        if key == "init_lora_weights" and value in _STARTS:
            continue
        if value:
            raise ConfigError(
                f"{folder} does not fit: {key} = {json.dumps(value)} in its {_CONFIG} changes what "
                "it computes, which is not supported"
            )
    return {**usual, **stored}


MOST_REPEATED = 4  # parts of a regular expression


def _require_quick(pattern: str) -> None:
    """Raise re.error for an expression that may never finish. Others may have sent it."""
    many = len(re.findall(r"(?<![(\\])[*+?{]", pattern)) > MOST_REPEATED
    if many or re.search(r"\)[*+{]", pattern):
        raise re.error(f"it repeats a group, or more than {MOST_REPEATED} parts")


def _scaling(folder: Path, config: Mapping[str, Any]) -> Callable[[str, int], float | None]:
    """A function of a layer's path and rank: the factor that PEFT puts before the layer's product.

    It gives None for a layer of another rank. ConfigError for a value that is not a number, or a
    pattern that cannot be used.
    """
    rank_of = _by_layer(folder, config, "r", "rank_pattern")
    alpha_of = _by_layer(folder, config, "lora_alpha", "alpha_pattern")

    def of(path: str, rank: int) -> float | None:
        if rank_of(path) != rank:
            return None
        return alpha_of(path) / (rank**0.5 if config["use_rslora"] else rank)

    return of


def _by_layer(
    folder: Path, config: Mapping[str, Any], key: str, patterns: str
) -> Callable[[str], float]:
    """A layer's own number: that of the first pattern that its path ends with, or the usual one."""
    given = config[patterns] or {}
    numbers: list[Any] = [config[key], *given.values()] if isinstance(given, dict) else [None]
    if not all(type(one) in (int, float) and abs(one) <= LARGEST for one in numbers):
        raise ConfigError(
            f"{folder} is damaged: {key} or {patterns} in its {_CONFIG} is not a number, or beyond "
            f"{LARGEST:g}"
        )
    own = []
    for pattern, number in given.items():
        try:
            _require_quick(pattern)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of brackets within brackets
                own.append((re.compile(rf"(.*\.)?({pattern})$"), float(number)))
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{folder} does not fit: {pattern[:80]!r} of {patterns} in its {_CONFIG} cannot be "
                f"used: {one_line(error)}"
            ) from None
    usual = float(config[key])
    return lambda path: next((number for found, number in own if found.match(path)), usual)
