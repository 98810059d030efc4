"""LoRA in PEFT's terms: which layers carry it, and adapter folders in and out."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import transformers
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from rolora.algorithm.adapter import AdapterState, Specs
from rolora.algorithm.factors import to_peft
from rolora.errors import ConfigError
from rolora.files import new_folder
from rolora.model.bank import PREFIX

Kind = Literal["classification", "causal_lm"]
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """Where and how large the adapters are. ``layers``: "all", "top:k", or layer indices.

    ``target_modules`` empty means PEFT's default for the architecture. The scaling is
    alpha / rank, or alpha / √rank with ``rslora`` (Kalajdzievski 2023).
    """

    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    layers: str | tuple[int, ...] = "all"
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor in front of lora_B @ lora_A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def peft_config(
    model: Any, kind: Kind, settings: LoraSettings, source: str, head_layers: Sequence[str]
) -> Any:
    """The peft.LoraConfig of an adapter on ``model``; it both finds the layers and is saved.

    Raises ConfigError where PEFT has no default target modules or the layers do not exist.
    """
    architecture = model.config.model_type
    names = {path.rpartition(".")[2] for path in _usable_paths(model, head_layers)}
    targets: Any = list(settings.target_modules)
    if targets == ["all-linear"]:
        targets = sorted(names)  # by name, so that lora.layers holds for them too
    if not targets:
        targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(architecture)
    if not targets:
        raise ConfigError(
            f"no default target_modules for {architecture!r}: set lora.target_modules to some of "
            + ", ".join(sorted(names))
        )
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        layers_to_transform=_layer_indices(settings.layers, model.config),
        use_rslora=settings.rslora,
        fan_in_fan_out=architecture == "gpt2",
        modules_to_save=sorted(
            {p.split(".")[0] if above_encoder(model, p) else p for p in head_layers}
        )
        or None,
        task_type="SEQ_CLS" if kind == "classification" else "CAUSAL_LM",
        base_model_name_or_path=source,
        inference_mode=True,
    )


def above_encoder(model: Any, path: str) -> bool:
    """Whether a module is part of the task head that transformers puts on its pre-trained model."""
    return not path.startswith(f"{model.base_model_prefix}.")


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


def _usable_paths(model: Any, head_layers: Sequence[str]) -> list[str]:
    """Linear layers that may carry LoRA: neither the task head nor the output embedding."""
    output = model.get_output_embeddings()
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [
        path
        for path, module in model.named_modules()
        if (isinstance(module, kinds) or "Linear" in type(module).__name__)
        and path not in head_layers
        and module is not output
    ]


def target_layers(model: nn.Module, config: Any, head_layers: Sequence[str]) -> list[str]:
    """Dotted paths of the linear layers that ``config`` (a peft.LoraConfig) selects.

    The task head and the output embedding are never among them. Raises ConfigError if none is.
    """
    usable = _usable_paths(model, head_layers)
    found = [path for path in usable if check_target_module_exists(config, path)]
    if not found:
        names = sorted({path.rpartition(".")[2] for path in usable})
        raise ConfigError(
            f"no layer is named {' or '.join(sorted(config.target_modules))} (lora.target_modules, "
            f"lora.layers); this model has {', '.join(names)}"
        )
    return found


def save_adapter(
    folder: Path, adapter: AdapterState, config: Any, model_config: Any, notes: Mapping[str, Any]
) -> None:
    """Write a PEFT adapter folder, whole or not at all.

    Cores and deltas go into the factors, so ranks may differ from layer to layer. Beside PEFT's two
    files the folder holds the model's ``config.json`` (labels) and ``rolora.json`` (``notes``).
    """
    plain = to_peft(adapter)
    if plain is not adapter:
        config = _with_ranks(config, plain)
    with new_folder(folder) as part:
        config.save_pretrained(str(part))
        save_file({n: t.contiguous() for n, t in plain.items()}, part / WEIGHTS, {"format": "pt"})
        model_config.save_pretrained(str(part))
        (part / "rolora.json").write_text(json.dumps(dict(notes), indent=2) + "\n")


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

    ``any_rank``: each layer may have a rank of its own, at the same scaling. Only safetensors is
    read. Raises ConfigError naming the first tensor that does not fit.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise ConfigError(
            f"{folder} is not a PEFT adapter with safetensors weights: {WEIGHTS} is missing"
        )
    expected = {spec.name: spec for spec in specs.tensors}
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
            for name, spec in expected.items():
                shape = shapes.get(name)
                if shape is None:
                    fits = spec.role == "head"
                elif any_rank and spec.role in ("A", "B"):
                    width = slice(1, None) if spec.role == "A" else slice(1)
                    fits = shape[width] == spec.shape[width]
                else:
                    fits = shape == spec.shape
                if not fits:
                    raise ConfigError(
                        f"{folder} does not fit: {name} is {shapes.get(name, 'missing')}, "
                        f"expected {spec.shape} (rank, target_modules and layers must be the same)"
                    )
            if extra := sorted(shapes.keys() - expected.keys()):
                raise ConfigError(f"{folder} does not fit: it also holds {extra[0]}")
            tensors = {name: stored.get_tensor(name).float() for name in shapes}
    except SafetensorError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error
    return AdapterState(tensors, specs.scaling)
