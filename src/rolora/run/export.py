"""A finished run's adapter in the forms that other programs load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from rolora.errors import ConfigError, RoloraError
from rolora.files import from_home
from rolora.model.export import (
    Dtype,
    require_gguf,
    write_gguf,
    write_merged,
    write_merged_gguf,
)
from rolora.model.peft import MODEL_CONFIG
from rolora.report.card import card
from rolora.results.runs import load_run
from rolora.run.evaluation import adapter_folder, load_trained, read_notes
from rolora.run.runs import card_source
from rolora.tasks.registry import task_kind

_OF_FOLDERS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export(
    path: str | Path,
    *,
    merged: Path | None = None,
    gguf: Path | None = None,
    dtype: Dtype = "fp32",
    model: str | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> None:
    """Write a finished run's adapter, or that of its adapter folder, in other forms.

    ``merged``: a new folder for the base with the adapter in its weights, and a model card if the
    adapter is in its run folder; for a base that is a GGUF file, it may be a new GGUF file.
    ``gguf``: a new file with the adapter alone, for llama.cpp. ``dtype``: of the weights that are
    written; "q8_0", 8 bits each, is for GGUF files, and stores matrices whose rows are no whole
    number of its blocks of 32 as fp16. ``model`` names the base where it has moved. ``notify``
    is told why there is no card, if the run folder is damaged. Raises
    ConfigError as ``evaluate_adapter`` does, for an adapter that cannot be written as GGUF, for a
    folder in q8_0, and if nothing is to be written.
    """
    if merged is None and gguf is None:
        raise ConfigError(
            "choose what to write: --merged FOLDER, --gguf FILE, or both; or upload with --push"
        )
    if merged == gguf:
        raise ConfigError(f"--merged and --gguf are both {gguf}: name two files")
    for option, out in {"--merged": merged, "--gguf": gguf}.items():
        if out is not None and out.exists():
            raise ConfigError(f"{out} exists and is not overwritten: name another with {option}")
    folder = merged is not None and merged.suffix != ".gguf"
    if folder and dtype not in _OF_FOLDERS:
        known = ", ".join(_OF_FOLDERS)
        raise ConfigError(f"--dtype {dtype} is for GGUF files; --merged FOLDER takes {known}")
    adapted = adapter_folder(path)
    notes = read_notes(adapted)
    if gguf is not None or not folder:  # before the model is loaded
        kind = task_kind(notes["config"]["model"]["task"])
        require_gguf(_model_type(adapted / MODEL_CONFIG), has_head=kind.head != "causal_lm")
    alone = ["device=cpu", "model.device_map=none"]
    here = [] if torch.cuda.is_available() else alone  # wherever it was trained
    trained, adapter, _ = load_trained(path, {}, model, here)
    config, base = trained.config, trained.base
    if gguf is not None:
        write_gguf(base, adapter, gguf, dtype)
    if merged is not None and not folder:
        source = config.root / from_home(config.model.path)
        write_merged_gguf(base, adapter, source, merged, dtype)
    elif merged is not None:
        run = adapted.resolve().parent
        text = ""
        try:  # damage to what a run says of itself is no damage to its adapter
            if (run / "rounds.jsonl").is_file():
                text = card(load_run(run), notes["round"], card_source(trained), merged=True)
        except RoloraError as error:
            notify(f"no model card is written: {error}")
        except (LookupError, TypeError, ValueError) as error:
            notify(f"no model card is written: {run} is damaged ({error!r})")
        write_merged(
            adapted,
            merged,
            config.model.path,
            trained.kind.head,
            trained.labels,
            root=config.root,
            dtype=_OF_FOLDERS[dtype],
            tokenizer=base.tokenizer,
            card=text,
            offline=config.offline,
        )


def _model_type(file: Path) -> str:
    """The architecture that a model's configuration names. ConfigError if it is damaged."""
    try:
        return str(json.loads(file.read_bytes())["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is missing or damaged: {error!r}") from None
