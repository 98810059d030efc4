"""The base model: load it, freeze it, and put a client bank under its target modules."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import metadata_load
from torch import Tensor, nn

from rolora.algorithm.adapter import AdapterState, Specs, tensor_hash
from rolora.data.examples import Batch, Examples, moved
from rolora.errors import ConfigError, DataError
from rolora.model.bank import Bank, Noise, attach
from rolora.model.checkpoint import (
    AUTO,
    WIDTHS,
    Quantised,
    generic_names,
    in_order_of_outputs,
    load_model,
    load_tokenizer,
    locate,
    one_line_errors,
    quantisation,
    quiet,
    read_config,
    require_here,
    shapes,
)
from rolora.model.peft import Kind, LoraSettings, above_encoder, linear_layers, peft_config
from rolora.model.probe import unfit
from rolora.model.stack import Stack, device_map, take_over

# Keys of a model's configuration that do not change what its layers compute from the same weights:
# names, versions, formats, what the run itself sets, what is returned beside the outputs.
_NO_EFFECT = {
    *("_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map"),
    *("dtype", "torch_dtype", "quantization_config", "use_cache", "return_dict"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    *("output_attentions", "output_hidden_states", "task_specific_params"),
    *("attn_implementation", "experts_implementation"),
}


LARGEST_CARD = 1_000_000  # bytes


def _computation(config: Any) -> str:
    """The part of a model's configuration that computes, where it differs from its type's own."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): kept(v) for k, v in value.items() if k not in _NO_EFFECT}
        return [kept(one) for one in value] if isinstance(value, list | tuple) else value

    return json.dumps(kept(config.to_diff_dict()), sort_keys=True, default=str)


class Limit(NamedTuple):
    """The most tokens that a row may have, and what sets it."""

    tokens: int
    source: str


@dataclass(frozen=True)
class Base:
    """A frozen base model with a client bank in it, its tokenizer, and its PEFT configuration.

    An ``outline`` has shapes and no values (``rolora.plan.meta_model``). ``note``: what the user
    should know of how it was loaded, or nothing.
    """

    model: nn.Module
    tokenizer: Any
    bank: Bank
    peft_config: Any
    head_layers: tuple[str, ...]
    stack: Stack | None
    outline: bool = False
    note: str = ""

    @property
    def specs(self) -> Specs:
        """What an adapter of this model looks like."""
        return self.bank.specs

    @property
    def licence(self) -> str | None:
        """What the card in the base's folder states; None without a card, or one that says so."""
        file = Path(str(self.model.name_or_path)) / "README.md"
        if not file.is_file() or file.stat().st_size > LARGEST_CARD:
            return None
        with contextlib.suppress(Exception):  # anybody may have written it; it decides nothing
            found = (metadata_load(file) or {}).get("license")
            return found if isinstance(found, str) else None
        return None

    @cached_property
    def digest(self) -> str:
        """A hash of every weight that stays as the checkpoint has it, and of how it computes."""
        weights = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if not name.startswith(tuple(f"{layer}." for layer in self.head_layers))
        }
        digest = hashlib.sha256(_computation(self.model.config).encode())
        for name, tensor in sorted({**weights, **self.specs.head}.items()):
            digest.update(f"{name} {tensor_hash(tensor.cpu())}".encode())
        return digest.hexdigest()[:32]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen weights are in."""
        return next(self.model.parameters()).dtype

    def limit(self, wanted: int) -> Limit:
        """``wanted`` tokens (data.max_length), or as many as the model or tokenizer takes."""
        limits = [
            Limit(wanted, "data.max_length"),
            Limit(int(self.tokenizer.model_max_length), "the tokenizer's model_max_length"),
            Limit(_positions(self.model), "the positions that the model has"),
        ]
        return min(limits, key=lambda limit: limit.tokens)

    def require_known(self, examples: Examples, source: str) -> Examples:
        """The examples. DataError for a token, or a token type, that the model's tables lack."""
        rows, types = _embeddings(self.model), getattr(self.model.config, "type_vocab_size", 0)
        most = int(examples.tokens.max()) if len(examples.tokens) else 0
        if rows is not None and most >= rows:
            token = self.tokenizer.convert_ids_to_tokens(most)
            raise DataError(
                f"{source}: token {token!r} has the id {most}, "
                f"but the model's embedding has {rows} rows: the tokenizer was given tokens that "
                "the model was not; resize the model's embedding and save both again"
            )
        if examples.types is not None and 0 < types <= int(examples.types.max()):
            raise DataError(
                f"{source}: the tokenizer marks the second text with token type "
                f"{int(examples.types.max())}, but the model has {types}: put both texts into one "
                "column"
            )
        return examples

    @contextlib.contextmanager
    def running(
        self, batch: Batch, sizes: Sequence[int] = (), keys: Tensor | None = None
    ) -> Iterator[Batch]:
        """The batch as the model takes it while this lasts: packed where the model can be.

        ``sizes``: rows of each client in the bank (empty for one client); ``keys`` int64 (rows,)
        seed LoRA's dropout, which is off without them and the same for all sequences of a row.
        """
        bank, lengths = self.bank, batch.lengths
        batch = replace(batch, sizes=tuple(sizes))
        sizes = [size * batch.each for size in sizes]
        bank.rows, bank.tokens = tuple(sizes), ()
        if keys is not None:
            keys = moved(keys.repeat_interleave(batch.each), self.device)
        bank.noise = None if keys is None else Noise(keys)
        if self.stack is None:
            yield batch
            return
        with self.stack.packed(lengths, batch.prefix) as packing:
            if packing is None:
                yield batch
                return
            if sizes:
                bank.tokens = tuple(int(part.sum()) for part in torch.split(lengths, list(sizes)))
            if bank.noise is not None:
                bank.noise = replace(bank.noise, tokens=(packing.row, packing.position))
            # right-padded rows need no mask where each attends to itself alone
            inputs = {k: v for k, v in batch.inputs.items() if k != "attention_mask"}
            yield replace(batch, inputs=inputs)

    @contextlib.contextmanager
    def holding(self, adapter: AdapterState | None) -> Iterator[None]:
        """The model with this one adapter in its bank, or none; afterwards with what it held."""
        with self.bank.lent():
            if adapter is not None:
                self.bank.load([adapter])
            yield


def load_base(
    source: str,
    kind: Kind,
    settings: LoraSettings,
    *,
    root: Path = Path(),
    labels: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    quantise: Quantised | None = None,
    device: str = "cpu",
    devices: Sequence[int | torch.device] = (),
    offline: bool = False,
) -> Base:
    """Load a model and tokenizer and put a bank under its target modules.

    ``source`` is a folder (relative to ``root``), a file ending in ``.gguf``, or "hub:NAME". Only
    safetensors and GGUF weights are read and no remote code runs. ``quantise``: the linear layers
    but the head's through bitsandbytes. ``devices``, in place of ``device``: those that the layers
    are spread over. A trained head is used only where the checkpoint names its outputs as
    ``labels``, in this order. Raises ConfigError, in one line, for anything unusable.
    """
    place = locate(source, root, offline)
    require_here(place, offline)
    how = quantisation(place, AUTO[kind], quantise, dtype, device) if quantise else {}
    refusal = ConfigError(
        f"the layers of {source!r} cannot be spread over GPUs: remove model.device_map"
    )
    if devices:
        with one_line_errors(source):
            share = WIDTHS[quantise] / dtype.itemsize if quantise else 1.0
            how["device_map"] = device_map(shapes(place, AUTO[kind]), devices, share)
        if how["device_map"] is None:
            raise refusal
    with one_line_errors(source), quiet():
        stored = read_config(place)
        tokenizer = load_tokenizer(place)
        model, info = load_model(kind, place, labels, dtype=dtype, **how)
    missing = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    outputs = set() if kind == "causal_lm" else _outputs(model)
    note = ""
    if not outputs <= set(info["missing_keys"]) and (
        in_order_of_outputs(stored, labels) != [*labels] or outputs & missing
    ):
        missing |= outputs
        note = _another_head(stored, labels)
    if model.config.pad_token_id is None:  # else the model was built around it (RoBERTa)
        model.config.pad_token_id = tokenizer.pad_token_id
    base = with_bank(model, tokenizer, kind, settings, source, missing)
    base.peft_config.revision = place.get("revision")
    if devices and base.stack is None:
        raise refusal
    if not how:
        base.model.to(device)
    return replace(base, note=note)


def _outputs(model: Any) -> set[str]:
    """The parameters of the layers that give one number per label."""
    return {
        f"{path}.{key}"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and above_encoder(model, path)
        and module.out_features == model.config.num_labels
        for key, _ in module.named_parameters()
    }


def _another_head(stored: Any, labels: Sequence[object]) -> str:
    names = [str(stored.id2label.get(index)) for index in range(stored.num_labels)]
    unnamed = names == generic_names(len(names))
    called = "have no names" if unnamed else f"are {_listed(names)}"
    wanted = f"run's labels are {_listed(labels)}" if labels else "run predicts one number"
    return (
        f"the checkpoint's head is not used and a new one is drawn: its {len(names)} outputs "
        f"{called}, the {wanted}"
    )


def _listed(names: Sequence[object], most: int = 5) -> str:
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def with_bank(
    model: Any,
    tokenizer: Any,
    kind: Kind,
    settings: LoraSettings,
    source: str,
    missing: Collection[str] = (),
    outline: bool = False,
) -> Base:
    """The frozen base that ``model``, changed in place, becomes.

    ``source`` names it in messages; the weights named in ``missing`` are not from the checkpoint;
    of an ``outline`` only shapes are checked. Raises ConfigError for a model that cannot carry
    per-client adapters.
    """
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"{source!r} is an encoder-decoder, which is not supported: set model.path to an "
            "encoder or to a decoder-only model"
        )
    if (rows := _embeddings(model)) is not None and tokenizer.pad_token_id >= rows:
        raise ConfigError(
            f"the padding token of {source!r} has the id {tokenizer.pad_token_id}, but the model's "
            f"embedding has {rows} rows: name a token that it has as pad_token in the model's "
            "tokenizer_config.json"
        )
    head_layers = [] if kind == "causal_lm" else _head_layers(model, missing, source)
    if kind == "causal_lm" and missing:
        raise ConfigError(f"{source!r} lacks {min(missing)}: it is not a causal language model")
    model.eval()
    with torch.device(next(model.parameters()).device):  # where the probes make their rows
        faults = unfit(model, [*linear_layers(model, head_layers), *head_layers], outline=outline)
    if faulty := [path for path in head_layers if path in faults]:
        raise ConfigError(
            f"layer {faulty[0]!r} of the task head {faults[faulty[0]]}, so it cannot be trained "
            "per client: use another model"
        )
    config, layers = peft_config(model, kind, settings, head_layers, faults)
    bank = attach(
        model,
        layers,
        head_layers,
        missing=missing,
        head_std=float(getattr(model.config, "initializer_range", 0.02)),
        b_std=float(getattr(model.config, "lora_b_std", 0.0)),
        rank=settings.rank,
        scaling=settings.scaling,
        dropout=settings.dropout,
    )
    with torch.device(next(model.parameters()).device):
        stack = take_over(model, set(layers).__contains__, trusted=outline)
    return Base(model, tokenizer, bank, config, tuple(head_layers), stack, outline)


def _positions(model: Any) -> int:
    """How many tokens a row may have, by the model's position embeddings; 2^30 without a limit.

    RoBERTa's kind counts positions from behind the padding token's id.
    """
    for path, module in model.named_modules():
        if (
            path.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return int(module.num_embeddings - module.padding_idx - 1)
    found = [getattr(model.config, key, None) for key in ("max_position_embeddings", "max_seq_len")]
    return next((int(most) for most in found if most), 1 << 30)


def _embeddings(model: Any) -> int | None:
    """The rows of the table of tokens, if there is one."""
    try:
        return len(model.get_input_embeddings().weight)
    except NotImplementedError:
        return None


def _head_layers(model: Any, missing: Collection[str], source: str) -> list[str]:
    """The layers above the pre-trained encoder, and the linear ones that the checkpoint lacks."""
    found = [
        path
        for path, module in model.named_modules()
        if path
        and any(True for _ in module.parameters(recurse=False))
        and (
            above_encoder(model, path)
            or (isinstance(module, nn.Linear) and f"{path}.weight" in missing)
        )
    ]
    layers = {name: name.rpartition(".")[0] for name in missing}
    if uncovered := sorted(name for name, path in layers.items() if path not in found):
        raise ConfigError(f"{source!r} lacks {uncovered[0]}, which is not part of a task head")
    return found


def tokenizer_digest(base: Base) -> str:
    """A hash of the tokenizer's vocabulary, rules and template, whatever it was last used for."""
    tokenizer = base.tokenizer
    rules: dict[str, Any]
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"truncation": None, "padding": None}  # settings of the last call
    else:  # its rules are code: its name, and what it makes of letters, cases and accents
        rules = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "probe": tokenizer("Ab aB, \u00e9\u00c9 x1")["input_ids"],
        }
    rules["chat template"] = tokenizer.chat_template
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:32]


def layout(base: Base) -> str:
    """A hash of the names and shapes of the adapter's tensors."""
    lines = (f"{spec.name} {spec.shape}\n" for spec in base.specs.tensors)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]
