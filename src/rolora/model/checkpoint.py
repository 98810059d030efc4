"""A model's checkpoint as transformers reads it: a folder, hub name or GGUF file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open

from rolora.errors import ConfigError, ModelNotHere
from rolora.files import from_home
from rolora.model import pixel_network
from rolora.model.peft import MODEL_CONFIG, Kind
from rolora.network import HUB, is_reachable

Quantised = Literal["int8", "nf4"]
WIDTHS: Mapping[str, float] = {"int8": 1.0, "nf4": 0.5}  # bytes of a weight
AUTO: Mapping[Kind, Any] = {
    "classification": transformers.AutoModelForSequenceClassification,
    "multi_label": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "causal_lm": transformers.AutoModelForCausalLM,
}


def locate(source: str, root: Path, offline: bool) -> dict[str, Any]:
    """The place of a model, as arguments of ``from_pretrained``; registers our model types.

    "hub:NAME" or "hub:NAME@REVISION" is on the hub. Without "hub:", a path; a name of at most one
    slash is looked for on the hub if there is no such folder, nor one that would hold it.
    ConfigError for a path that does not exist, and for a folder of GGUF files alone.
    """
    pixel_network.register()
    if source.startswith(HUB):
        return _on_hub(source, offline)
    path = root / from_home(source)
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
        files = sorted(file.name for file in path.glob("*.gguf"))
        if files and not (path / "config.json").is_file():
            raise ConfigError(
                f"model folder {source!r} has no config.json, but {files[0]!r}: give that file"
            )
        return {"pretrained_model_name_or_path": str(path), "local_files_only": True}
    owned = source.count("/") == 1 and path.parent.is_dir()
    if owned or source.startswith((".", "/", "~")) or source.count("/") > 1:
        looked = f"model folder {source!r} does not exist (looked for {path})"
        hint = f"; for the hub's model, write {HUB}{source}" if owned else ""
        raise ModelNotHere(looked + hint, path)
    return _on_hub(f"{HUB}{source}", offline)


def _on_hub(source: str, offline: bool) -> dict[str, Any]:
    """The place of ``hub:NAME`` or ``hub:NAME@REVISION``. ConfigError if a folder has this name."""
    name, _, revision = source.removeprefix(HUB).partition("@")
    if Path(name).exists():  # transformers would take it, wherever the command is run
        raise ConfigError(
            f"model {name!r} is on the hub, but {Path(name).resolve()} has the same name: give a "
            "path that begins with ./, or work in another folder"
        )
    hub = transformers.utils.hub
    alone = offline or hub.is_offline_mode() or not is_reachable(hub.constants.ENDPOINT)
    pinned = {"revision": revision} if revision else {}
    return {"pretrained_model_name_or_path": name, "local_files_only": alone, **pinned}


def require_here(place: dict[str, Any], offline: bool) -> None:
    """Raise ConfigError if the hub's cache lacks this name and the hub is out of reach."""
    name = place["pretrained_model_name_or_path"]
    if not place["local_files_only"] or Path(name).is_dir():
        return
    try:
        read_config(place)
    except OSError as error:
        why = "offline = true" if offline else "the hub does not answer"
        pinned = f" --revision {place['revision']}" if "revision" in place else ""
        raise ConfigError(
            f"model {name!r} is not on this machine, and {why}: on a machine with network access, "
            f"run hf download {name}{pinned} (it stays in the hub's cache), or set model.path to "
            "its folder"
        ) from error


def read_config(place: dict[str, Any]) -> Any:
    """A model's configuration. No code that it names is fetched or run.

    ``place``: see ``locate``. ConfigError for a configuration that needs such code: a type of
    model that comes with its own (``auto_map``), or kernels from a hub. Raises OSError where there
    is none.
    """
    stored, _ = transformers.PreTrainedConfig.get_config_dict(**place)
    name = place["pretrained_model_name_or_path"]
    if key := _kernel(stored):
        raise ConfigError(
            f"the configuration of {name!r} asks for code from a hub ({key}), which is never run: "
            "remove this key from its config.json"
        )
    if "auto_map" in stored and stored.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"the model {name!r} computes with its own code (auto_map in its config.json), which "
            "is never run: use a model of a type that transformers has"
        )
    return transformers.AutoConfig.from_pretrained(**place, trust_remote_code=False)


def _kernel(stored: Any) -> str:
    """The first key of a configuration, at any depth, that names a kernel of a hub; "" if none.

    What computes attention or experts is a word, such as "sdpa"; with a slash, it is a repository.
    """
    if isinstance(stored, list):
        return next(filter(None, map(_kernel, stored)), "")
    if not isinstance(stored, dict):
        return ""
    items: dict[str, Any] = stored
    for key, value in items.items():
        if key in ("use_kernels", "kernel_config") and value:
            return key
        if key.endswith("_implementation") and "/" in json.dumps(value):
            return key
        if found := _kernel(value):
            return f"{key}.{found}"
    return ""


def outputs_config(kind: Kind, labels: Sequence[str]) -> dict[str, Any]:
    """What a model's configuration says of its outputs: one per label, or one number.

    ``problem_type`` too, which pipelines use: a checkpoint may come from another problem.
    """
    if kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    problem = "multi_label" if kind == "multi_label" else "single_label"
    return {
        "num_labels": len(labels),
        "problem_type": f"{problem}_classification",
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }


def in_order_of_outputs(config: Any, labels: Sequence[Any]) -> list[Any] | None:
    """The labels in the order of a checkpoint's outputs; None unless its outputs are these labels.

    ``config.id2label`` names the outputs. Names match exactly or, where that keeps them apart, case
    aside. Names that transformers fills in, LABEL_0, LABEL_1, ..., may stand for "0", "1", ...
    Without labels, the outputs have to be one number.
    """
    if not labels:
        return [] if config.num_labels == 1 else None
    names = [str(config.id2label.get(index)) for index in range(config.num_labels)]
    ours = {str(label): label for label in labels}
    folded = {name.casefold(): label for name, label in ours.items()}
    ways = [(names, ours), ([name.casefold() for name in names], folded)]
    if names == generic_names(len(names)):
        ways.append(([str(index) for index in range(len(names))], ours))
    for outputs, found in ways:
        if len(found) == len(labels) and sorted(found) == sorted(outputs):
            return [found[name] for name in outputs]
    return None


def generic_names(count: int) -> list[str]:
    """What transformers calls the outputs of a model that has no names for them."""
    return [f"LABEL_{index}" for index in range(count)]


def in_order_of_checkpoint(
    source: str, labels: Sequence[Any], *, root: Path, offline: bool
) -> list[Any]:
    """The labels in the order of the outputs of the model ``source``, where it names just these.

    Otherwise as they are, also where the model cannot be read: loading it will say why.
    """
    with contextlib.suppress(ConfigError), one_line_errors(source), quiet():
        place = locate(source, root, offline)
        if "gguf_file" not in place:
            config = read_config(place)
            return in_order_of_outputs(config, labels) or [*labels]
    return [*labels]


def in_order_of_adapter(folder: Path, labels: Sequence[Any]) -> list[Any] | None:
    """The labels in the order of the head of an adapter folder; as they are if it names none."""
    file = folder / MODEL_CONFIG
    if not file.is_file():
        return [*labels]
    with one_line_errors(str(file)):
        config = read_config({"pretrained_model_name_or_path": str(file)})
        return in_order_of_outputs(config, labels)


def stored_parameters(folder: Path) -> int:
    """The parameters in a folder's safetensors files, by their headers; 0 if none can be read."""
    count = 0
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as stored:
                sizes = [stored.get_slice(key).get_shape() for key in stored.keys()]  # noqa: SIM118
            count += sum(map(math.prod, sizes))
    except (OSError, SafetensorError):
        return 0
    return count


def shapes(place: dict[str, Any], auto: Any) -> Any:
    """The model at this place without its weights, on torch's device "meta"."""
    with torch.device("meta"):
        return auto.from_config(read_config(place), trust_remote_code=False)


def quantisation(
    place: dict[str, Any], auto: Any, quantise: Quantised, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` to load through bitsandbytes. ConfigError without it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"model.dtype = {quantise!r} needs: pip install 'rolora[quantised]'")
    if quantise == "nf4" and device != "cuda":  # bitsandbytes has no gradient through it there
        raise ConfigError("model.dtype = 'nf4' needs device = 'cuda'; on a CPU use 'int8'")
    model = shapes(place, auto)
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


def load_model(
    kind: Kind, place: dict[str, Any], labels: Sequence[str], **more: Any
) -> tuple[Any, dict[str, Any]]:
    """The model at this place with an output per label, if its kind has such, and what transformers
    says of loading it. No remote code runs.

    A GGUF file is unpacked into plain weights. Left packed, which is the default where the package
    kernels is installed, it could not be trained around, and would compute with code from the hub.
    """
    packed = "gguf_file" in place
    if packed and (config := getattr(transformers, "GgufConfig", None)):
        more["quantization_config"] = config(dequantize=True)
    if kind != "causal_lm":
        more |= {**outputs_config(kind, labels), "ignore_mismatched_sizes": True}
    model, info = AUTO[kind].from_pretrained(
        **place,
        **more,
        trust_remote_code=False,
        use_safetensors=None if packed else True,
        output_loading_info=True,
    )
    return model, info


def load_tokenizer(place: dict[str, Any]) -> Any:
    """The tokenizer, with a padding token. It raises whatever transformers does.

    ConfigError for one without a token to pad with.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("it has no tokenizer")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {place['pretrained_model_name_or_path']} has neither a padding nor "
            "an end-of-text token: name one as pad_token in its tokenizer_config.json"
        )
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
    """Silence transformers' loading bars and reports, and restore its settings afterwards.

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
