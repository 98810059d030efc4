"""A model's checkpoint as transformers reads it: a folder, hub name or GGUF file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from rolora.errors import ConfigError, ModelNotHere
from rolora.model import pixel_network
from rolora.model.peft import Kind
from rolora.network import is_reachable

Quantised = Literal["int8", "nf4"]
AUTO: Mapping[Kind, Any] = {
    "classification": transformers.AutoModelForSequenceClassification,
    "causal_lm": transformers.AutoModelForCausalLM,
}


def locate(source: str, root: Path, offline: bool) -> dict[str, Any]:
    """The place of a model, as arguments of ``from_pretrained``; registers our model types.

    ConfigError for a path that does not exist.
    """
    pixel_network.register()
    path = root / Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            looked = f"model file {source!r} does not exist (looked in {path.parent})"
            raise ModelNotHere(looked, path)
        return {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": path.name,
            "local_files_only": True,
        }
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        looked = f"model folder {source!r} does not exist (looked for {path})"
        raise ModelNotHere(looked, path)
    hub = transformers.utils.hub
    alone = offline or hub.is_offline_mode() or not is_reachable(hub.constants.ENDPOINT)
    return {"pretrained_model_name_or_path": source, "local_files_only": alone}


def require_here(place: dict[str, Any], offline: bool) -> None:
    """Raise ConfigError for a hub name that the hub's cache lacks and nobody can be asked for."""
    name = place["pretrained_model_name_or_path"]
    if not place["local_files_only"] or Path(name).is_dir():
        return
    try:
        transformers.AutoConfig.from_pretrained(**place)
    except OSError as error:
        why = "offline = true" if offline else "the hub does not answer"
        raise ConfigError(
            f"model {name!r} is not on this machine, and {why}: on a machine with network access, "
            f"run hf download {name} (it stays in the hub's cache), or set model.path to its folder"
        ) from error


def label_names(labels: Sequence[str]) -> dict[str, Any]:
    """What a model's configuration says of its labels."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }


def quantisation(
    place: dict[str, Any], auto: Any, quantise: Quantised, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` to load through bitsandbytes. ConfigError without it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"model.dtype = {quantise!r} needs: pip install 'rolora[quantised]'")
    if quantise == "nf4" and device != "cuda":  # bitsandbytes has no gradient through it there
        raise ConfigError("model.dtype = 'nf4' needs device = 'cuda'; on a CPU use 'int8'")
    config = transformers.AutoConfig.from_pretrained(**place)
    with torch.device("meta"):
        model = auto.from_config(config)
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    how = transformers.BitsAndBytesConfig(
        load_in_8bit=quantise == "int8",
        load_in_4bit=quantise == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        # outliers are looked for in the whole batch, which would tie clients to each other
        llm_int8_threshold=0.0,
        llm_int8_skip_modules=head,
    )
    return {"quantization_config": how, "device_map": {"": device}}


def load_tokenizer(place: dict[str, Any]) -> Any:
    """The tokenizer, with a padding token. It raises whatever transformers does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("it has no tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """Any error within becomes a ConfigError that names the model."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a damaged config.json makes transformers raise anything
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ConfigError(
            f"cannot load model {source!r}: {first or type(error).__name__} "
            "(give a folder, a hub name, or a .gguf file; weights must be safetensors or GGUF)"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading bars and reports, and put its settings back afterwards.

    Standard error too: the GGUF reader draws a bar on it whatever the settings are.
    """
    logs = transformers.utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()
