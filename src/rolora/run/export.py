"""A finished run's adapter in the forms that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from rolora.model.export import write_gguf, write_merged
from rolora.run.evaluation import adapter_folder, load_trained
from rolora.run.folder import require_new

Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    path: str | Path,
    *,
    merged: Path | None = None,
    gguf: Path | None = None,
    dtype: Dtype = "fp32",
    model: str | None = None,
) -> None:
    """Write a finished run's adapter, or that of its adapter folder, in other forms.

    ``merged``: a new folder for the base with the adapter in its weights, of this ``dtype``.
    ``gguf``: a file with the adapter alone, for llama.cpp. ``model`` names the base where it has
    moved. Raises ConfigError as ``evaluate_adapter`` does, and for an adapter that cannot be
    written as GGUF.
    """
    if merged is not None:
        require_new(merged)
    trained, adapter, _ = load_trained(path, {}, model, [])
    config, base = trained.config, trained.base
    if gguf is not None:
        write_gguf(base, adapter, gguf)
    if merged is not None:
        write_merged(
            adapter_folder(path),
            merged,
            config.model.path,
            trained.kind.head,
            trained.labels,
            root=config.root,
            dtype=_DTYPES[dtype],
            tokenizer=base.tokenizer,
            offline=config.offline,
        )
