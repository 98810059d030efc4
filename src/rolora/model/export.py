"""An adapter in other forms: merged into its base, and as GGUF for llama.cpp."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

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

Dtype = Literal["fp32", "fp16", "bf16", "q8_0"]
_GGUF = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}

# model type -> llama.cpp's name of it, and the layers whose rows it wants in another order: it
# rotates neighbouring halves of a head where transformers rotates its first half with its second
_ROTARY = ("self_attn.q_proj", "self_attn.k_proj")
_LLAMA_CPP: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("llama", _ROTARY),
    "mistral": ("llama", _ROTARY),
    "qwen2": ("qwen2", ()),
    "qwen3": ("qwen3", ()),
    "gemma": ("gemma", ()),
    "phi3": ("phi3", ()),
}


def require_gguf(model_type: str, *, has_head: bool) -> None:
    """ConfigError unless it is known how llama.cpp holds the weights of such a model."""
    known = model_type in _LLAMA_CPP
    if not known or has_head:
        what = "an adapter with a task head" if known else f"an adapter of a {model_type!r}"
        raise ConfigError(
            f"{what} cannot be written as GGUF, only of {', '.join(sorted(_LLAMA_CPP))} for "
            "language modelling: use --merged, and the converter that comes with llama.cpp"
        )


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
    card: str,
    offline: bool = False,
) -> None:
    """Write the base at ``source`` with this adapter in its weights, as a transformers folder.

    PEFT adds the products in float32; then all weights become ``dtype``. ``card`` is the text of
    its README.md; there is none if it is empty. Written whole or not at all. ConfigError for a base
    that cannot be read.
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
        if card:
            (part / "README.md").write_text(card, encoding="utf-8")
        for weights in part.glob("*.safetensors"):  # which safetensors keeps for the owner
            weights.chmod((part / "config.json").stat().st_mode)


def write_gguf(base: Base, adapter: AdapterState, out: Path, dtype: Dtype) -> None:
    """Write a causal model's adapter as a GGUF file of this ``dtype`` for llama.cpp's ``--lora``.

    llama.cpp scales each product by the file's alpha over the layer's rank; what the adapter's own
    scaling differs from that by goes into lora_B. Written whole or not at all. ConfigError for an
    architecture whose weights llama.cpp may hold in an order that is not known here.
    """
    config: Any = base.model.config
    factors, alpha = _factors(base, adapter), float(base.peft_config.lora_alpha)
    with _new_gguf(out, _LLAMA_CPP[config.model_type][0]) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, (down, up) in factors.items():
            for letter, factor in {"a": down, "b": up * len(down) / alpha}.items():
                data, kind = _stored(factor.contiguous().numpy(), dtype)
                writer.add_tensor(f"{name}.lora_{letter}", data, raw_dtype=kind)


def write_merged_gguf(
    base: Base, adapter: AdapterState, source: Path, out: Path, dtype: Dtype
) -> None:
    """Write the GGUF file ``source``, a causal model's base, with this adapter in its weights.

    Products are added in float32, and the adapted layers' weights stored in ``dtype``; everything
    else is copied as it is. Written whole or not at all. ConfigError as in ``write_gguf``, for a
    base that is no GGUF file, and for an adapted layer that has no weight of its own in the file.
    """
    if source.suffix != ".gguf":
        raise ConfigError(
            f"the base {source.name!r} is not a GGUF file, so there is none to merge into: name a "
            "folder with --merged, and use the converter that comes with llama.cpp"
        )
    factors, reader = _factors(base, adapter), gguf.GGUFReader(source)
    if lacking := factors.keys() - {tensor.name for tensor in reader.tensors}:
        raise ConfigError(
            f"{min(lacking)!r}, which the adapter changes, is not in {source.name!r}: name a "
            "folder with --merged"
        )
    with _new_gguf(out, reader.fields["general.architecture"].contents()) as writer:
        writer.data_alignment = reader.alignment
        own = ("general.architecture", "general.file_type")  # the type is no longer that of all
        for field in reader.fields.values():
            if field.name not in own and not field.name.startswith("GGUF."):
                inner = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), field.types[0], inner)
        for tensor in reader.tensors:
            data, kind = tensor.data, tensor.tensor_type
            if tensor.name in factors:
                down, up = factors[tensor.name]
                data, kind = _stored(gguf.dequantize(data, kind) + (up @ down).numpy(), dtype)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)


def _factors(base: Base, adapter: AdapterState) -> dict[str, tuple[Tensor, Tensor]]:
    """GGUF's name of each adapted weight -> lora_A (r, in) and the scaled lora_B (out, r).

    In float32, with the rows in llama.cpp's order. ConfigError as in ``write_gguf``.
    """
    config: Any = base.model.config
    require_gguf(config.model_type, has_head=bool(base.head_layers))
    name, rotary = _LLAMA_CPP[config.model_type]
    (architecture,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    factors = {}
    for layer, scaling in adapter.scaling.items():
        path = layer.removeprefix(PREFIX)
        up = adapter[f"{layer}.lora_B.weight"].float() * scaling
        if path.endswith(rotary):
            up = interleaved(up, heads[path.rpartition(".")[2]])
        if (called := names.get_name(path)) is None:
            raise ConfigError(f"layer {path!r} has no name in GGUF: use --merged")
        factors[f"{called}.weight"] = (adapter[f"{layer}.lora_A.weight"].float(), up)
    return factors


@contextlib.contextmanager
def _new_gguf(out: Path, architecture: str) -> Iterator[Any]:
    """A writer of a GGUF file, which is written whole when the block ends well, or not at all."""
    with new_file(out) as part:
        writer = gguf.GGUFWriter(part, architecture)
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _stored(matrix: Any, dtype: Dtype) -> tuple[Any, Any]:
    """A float32 array as a GGUF file stores it, and its type there.

    F16 if its rows are no whole number of blocks of ``dtype``, as in llama.cpp's converter.
    """
    kind = gguf.GGMLQuantizationType[_GGUF[dtype]]
    size, _ = gguf.GGML_QUANT_SIZES[kind]
    if matrix.shape[-1] % size:
        kind = gguf.GGMLQuantizationType.F16
    return gguf.quantize(matrix, kind), kind


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows, (heads × width, n), with each head's halves interleaved."""
    halves = rows.view(heads, 2, -1, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)
