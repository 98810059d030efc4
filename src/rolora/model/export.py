"""An adapter folder in other forms: merged into its base, and as GGUF for llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import peft
import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState
from rolora.errors import ConfigError
from rolora.files import new_file, new_folder
from rolora.model.bank import PREFIX
from rolora.model.base import Base
from rolora.model.checkpoint import load_model, locate, one_line_errors, quiet
from rolora.model.peft import Kind

# model type -> llama.cpp's name of it, and the layers whose rows it wants in another order: it
# rotates neighbouring halves of a head where transformers rotates its first half with its second
_ROTARY = ("self_attn.q_proj", "self_attn.k_proj")
_LLAMA_CPP: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("llama", _ROTARY),
    "mistral": ("llama", _ROTARY),
    "qwen2": ("qwen2", ()),
    "qwen3": ("qwen3", ()),
    "gemma": ("gemma", ()),
    "gemma2": ("gemma2", ()),
    "phi3": ("phi3", ()),
}


def write_merged(
    adapter: Path,
    out: Path,
    source: str,
    kind: Kind,
    labels: Sequence[str],
    *,
    root: Path,
    dtype: torch.dtype,
    tokenizer: Any,
    offline: bool = False,
) -> None:
    """Write the base at ``source`` with this adapter in its weights, as a transformers folder.

    PEFT adds the products in float32; then all weights become ``dtype``. Written whole or not at
    all. ConfigError for a base that cannot be read.
    """
    place = locate(source, root, offline)
    with one_line_errors(source), quiet():
        plain, _ = load_model(kind, place, labels, dtype=torch.float32)
        model: Any = peft.PeftModel.from_pretrained(plain, adapter)
    model = model.merge_and_unload(safe_merge=True).to(dtype)
    if model.config.pad_token_id is None:  # a classifier of rows of several lengths needs it
        model.config.pad_token_id = tokenizer.pad_token_id
    with new_folder(out) as part, quiet():
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def write_gguf(base: Base, adapter: AdapterState, out: Path) -> None:
    """Write a causal model's adapter as a float32 GGUF file for llama.cpp's ``--lora``.

    llama.cpp scales each product by the file's alpha over the layer's rank; what the adapter's own
    scaling differs from that by goes into lora_B. Written whole or not at all. ConfigError for an
    architecture whose weights llama.cpp may hold in an order that is not known here.
    """
    config: Any = base.model.config
    known = _LLAMA_CPP.get(config.model_type)
    if known is None or base.head_layers:
        what = "an adapter with a task head" if known else f"an adapter of a {config.model_type!r}"
        raise ConfigError(
            f"{what} cannot be written as GGUF, only of {', '.join(sorted(_LLAMA_CPP))} for "
            "language modelling: use --merged, and the converter that comes with llama.cpp"
        )
    name, rotary = known
    (architecture,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    alpha = float(base.peft_config.lora_alpha)
    with new_file(out) as part:
        writer = gguf.GGUFWriter(part, name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for layer, scaling in adapter.scaling.items():
            path = layer.removeprefix(PREFIX)
            down, up = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
            up = up * (scaling * len(down) / alpha)
            if path.endswith(rotary):
                up = interleaved(up, heads[path.rpartition(".")[2]])
            if (called := names.get_name(path)) is None:
                raise ConfigError(f"layer {path!r} has no name in GGUF: use --merged")
            writer.add_tensor(f"{called}.weight.lora_a", down.float().contiguous().numpy())
            writer.add_tensor(f"{called}.weight.lora_b", up.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows, (heads × width, n), with each head's halves interleaved."""
    halves = rows.view(heads, 2, -1, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)
