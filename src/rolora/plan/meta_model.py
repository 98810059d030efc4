"""A model without its weights, built from its configuration alone.

torch's fake tensors have shape, dtype and storage identity but no memory. Modules and operations
are the real ones, so the needs of a model of any size can be counted on any machine.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from rolora.model.base import Base, with_bank
from rolora.model.checkpoint import (
    AUTO,
    load_tokenizer,
    locate,
    one_line_errors,
    outputs_config,
    quiet,
    read_config,
    require_here,
)
from rolora.model.peft import Kind, LoraSettings, above_encoder
from rolora.model.stack import take_over

SHAPES = Path(__file__).with_name("shapes")
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2} | dict.fromkeys(
    ("hidden_size", "intermediate_size", "vocab_size"), 64
)


@dataclass(frozen=True)
class NoTokenizer:
    """A stand-in for a tokenizer that is not on this machine."""

    pad_token_id: int
    is_fast: bool = True
    chat_template: str = "-"
    model_max_length: int = 1 << 30


@dataclass(frozen=True)
class Outline:
    """A base model that has shapes only; it runs under ``mode``.

    ``tokenizer``: whether the model's tokenizer is on this machine. ``stored_bytes``: size of the
    weights' files. ``source``: where the configuration was found.
    """

    base: Base
    mode: FakeTensorMode
    tokenizer: bool
    stored_bytes: int
    source: str


def outline(
    source: str,
    kind: Kind,
    settings: LoraSettings,
    *,
    root: Path = Path(),
    labels: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    offline: bool = False,
) -> Outline:
    """The base of ``load_base`` with shapes only. No weights are read or downloaded.

    The configuration comes from a folder or GGUF file, the hub's cache, a file in
    ``rolora/plan/shapes``, or the hub. The checkpoint is assumed to lack the task's head, as a
    pre-trained one does. Raises ConfigError as ``load_base`` does.
    """
    place = locate(source, root, offline=True)
    with one_line_errors(source), quiet():
        config, found = _config(source, place, root, offline)
        width = (getattr(config, "dtype", None) or torch.float32).itemsize  # on disk
        if kind == "regression" or labels:
            config.update(outputs_config(kind, labels))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            model = AUTO[kind].from_config(config, dtype=dtype, trust_remote_code=False)
        tokenizer = _tokenizer(place)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0 if tokenizer is None else tokenizer.pad_token_id
    stored = _files(place) or width * sum(p.numel() for p in model.parameters())
    missing = set() if kind == "causal_lm" else _head(model)
    stand_in = NoTokenizer(model.config.pad_token_id)
    with mode:
        base = with_bank(
            model, tokenizer or stand_in, kind, settings, source, missing, outline=True
        )
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    if base.stack is not None and not causal:
        base.stack.first = _reads_first(config, kind)
    return Outline(base, mode, tokenizer is not None, stored, found)


def _reads_first(config: Any, kind: Kind) -> bool:
    """Whether the head reads each row's first token alone: seen by values, which an outline lacks,
    so of a small model of this kind."""
    small = copy.deepcopy(config)
    small.update(SMALL)
    with contextlib.suppress(Exception):  # then all tokens are counted, which is never too few
        model = AUTO[kind].from_config(small, trust_remote_code=False).eval()
        stack = take_over(model, lambda path: True)
        return stack is not None and stack.first
    return False


def _config(source: str, place: dict[str, Any], root: Path, offline: bool) -> tuple[Any, str]:
    """The model's configuration, and where it was found."""
    name = place["pretrained_model_name_or_path"]
    if Path(name).is_dir():
        return read_config(place), "its folder"
    with contextlib.suppress(OSError):
        return read_config(place), "the hub's cache"
    file = SHAPES / f"{name.removeprefix('FacebookAI/').replace('/', '--')}.json"
    if file.is_file():
        shape = json.loads(file.read_text())
        return transformers.AutoConfig.for_model(**shape), "rolora/plan/shapes"
    place = locate(source, root, offline)
    require_here(place, offline)
    return read_config(place), "the hub"


def _tokenizer(place: dict[str, Any]) -> Any:
    """The tokenizer, or None if it is not on this machine."""
    with contextlib.suppress(OSError, ValueError):
        return load_tokenizer(place)
    return None


def _head(model: Any) -> set[str]:
    """The parameters of the layers above the encoder."""
    return {name for name, _ in model.named_parameters() if above_encoder(model, name)}


def _files(place: dict[str, Any]) -> int:
    """Bytes of the weights' files on this machine."""
    folder = Path(place["pretrained_model_name_or_path"])
    files = [folder / place["gguf_file"]] if "gguf_file" in place else folder.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
