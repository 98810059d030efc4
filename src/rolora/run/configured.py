"""The parts that a configuration names: base model, task, method, reducer, local settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.method import Method, freeze_head
from rolora.algorithm.reduce import Reducer, clip, fedadam, fedavgm, mean, median, trimmed_mean
from rolora.algorithm.seeding import generator
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError
from rolora.methods import get_method, method_names
from rolora.model.base import Base, load_base
from rolora.model.peft import Kind, LoraSettings, read_adapter
from rolora.tasks.causal_lm import causal_lm
from rolora.tasks.choice import choice
from rolora.tasks.classification import Label, classification
from rolora.tasks.registry import Task
from rolora.training.local import LocalSettings


def load_base_for(config: RunConfig, labels: Sequence[object]) -> Base:
    """The configured base model; "auto" is float32 on a CPU. ConfigError for a device that is not
    there, or does not know bfloat16."""
    wanted = config.model.dtype
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no CUDA device; use device = 'cpu'")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device = 'mps', but torch sees no Apple GPU; use device = 'cpu'")
    if wanted == "bf16" and config.device == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("model.dtype = 'bf16', which this GPU does not have; use 'fp32'")
    return load_base(
        config.model.path,
        model_kind(config),
        lora_settings(config),
        root=config.root,
        labels=labels,
        dtype=torch.bfloat16 if in_half(config) else torch.float32,
        quantise=wanted if wanted in ("int8", "nf4") else None,
        device=config.device,
        offline=config.offline,
    )


def model_kind(config: RunConfig) -> Kind:
    """What the task needs of a model: classes, or the next token."""
    return "classification" if config.model.task == "classification" else "causal_lm"


def in_half(config: RunConfig) -> bool:
    """Whether the base is bfloat16 to begin with: if asked for, or by itself on a CUDA device."""
    wanted = config.model.dtype
    return wanted == "bf16" or (wanted == "auto" and config.device == "cuda")


def lora_settings(config: RunConfig) -> LoraSettings:
    """Where and how large the configured adapters are."""
    lora = config.lora
    return LoraSettings(
        rank=lora.largest,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=tuple(lora.target_modules),
        layers=lora.layers if isinstance(lora.layers, str) else tuple(lora.layers),
        rslora=lora.rslora,
    )


def text_columns(config: RunConfig) -> list[str]:
    """``data.text`` as a list."""
    text = config.data.text
    return [text] if isinstance(text, str) else list(text)


def make_task(config: RunConfig, base: Base, labels: Sequence[Label]) -> Task:
    """The configured task, with the columns it reads."""
    columns, limit = config.data, config.data.max_length
    if config.model.task == "classification":
        return classification(base, labels, text_columns(config), columns.label, limit)
    if config.model.task == "choice":
        return choice(
            base,
            prompt=str(columns.prompt),
            choices=str(columns.choices),
            answer=str(columns.answer),
            max_length=limit,
        )
    return causal_lm(
        base,
        prompt=columns.prompt,
        completion=columns.completion,
        messages=columns.messages,
        max_length=limit,
    )


def make_method(config: RunConfig) -> Method:
    """The configured method; with ``model.head = "freeze"`` it leaves the head alone.

    Raises ConfigError for a setting that the method cannot have.
    """
    method = get_method(config.method.name, **config.method.options)
    if not isinstance(config.lora.rank, int) and not method.heterogeneous_ranks:
        able = [name for name in method_names() if get_method(name).heterogeneous_ranks]
        raise ConfigError(
            f"{method.name} averages factors of one rank: give lora.rank as one number, or for "
            f"clients of different ranks take one of {', '.join(able)}"
        )
    if config.aggregate.optimizer != "none" and not method.supports_server_optimizer:
        able = [name for name in method_names() if get_method(name).supports_server_optimizer]
        raise ConfigError(
            f"aggregate.optimizer = {config.aggregate.optimizer!r} needs a server that only "
            f"averages what clients send, which {method.name} has not: leave it out, or take one "
            f"of {', '.join(able)}"
        )
    if config.train.local_steps == 1 and method.trainable(1, 0) != method.trainable(1, 1):
        raise ConfigError(
            f"{method.name} trains one factor in a local step and the other in the next: "
            "train.local_steps is at least 2"
        )
    return freeze_head(method) if config.model.head == "freeze" else method


def make_reducer(config: RunConfig) -> Reducer:
    """The configured reducer, clipped if a norm is given, under the server's optimiser if any."""
    how = config.aggregate
    if how.reducer == "trimmed_mean":
        reducer = trimmed_mean(how.trim)
    else:
        reducer = median() if how.reducer == "median" else mean()
    if how.clip_norm is not None:
        reducer = clip(reducer, how.clip_norm)
    if how.optimizer == "fedavgm":
        return fedavgm(reducer, how.server_lr or 1.0, how.server_momentum)
    if how.optimizer == "fedadam":
        lr, beta1, beta2 = how.server_lr or 0.01, how.server_momentum, how.server_beta2
        return fedadam(reducer, lr, beta1, beta2, how.server_tau)
    return reducer


def local_settings(config: RunConfig) -> LocalSettings:
    """How the configured clients train in a round."""
    train = config.train
    steps = 5 if train.local_steps is None and train.local_epochs is None else train.local_steps
    return LocalSettings(
        steps=steps,
        epochs=train.local_epochs,
        batch_size=train.batch_size,
        optimizer=train.optimizer,
        weight_decay=train.weight_decay,
        momentum=train.momentum,
        max_grad_norm=train.max_grad_norm,
        b_lr_ratio=train.b_lr_ratio,
    )


def revisits(config: RunConfig, sizes: Sequence[int]) -> bool:
    """Whether training comes by each row once or more often, in the mean; ``sizes`` of shards."""
    train, settings = config.train, local_settings(config)
    visits = sum(settings.num_steps(size) * min(size, train.batch_size) for size in sizes)
    return train.rounds * train.participation * visits >= sum(sizes)


def first_adapter(
    config: RunConfig, method: Method, base: Base, gradient: Mapping[str, Tensor] | None = None
) -> AdapterState:
    """What every client starts from: the method's own start, or a warm start from a PEFT folder.

    ``gradient``: of the loss at the start (``training.gradient``), for methods that need it.
    """
    specs = base.specs if gradient is None else replace(base.specs, gradient=gradient)
    start = method.init(specs, generator(config.seed, "init"))
    if config.lora.init_from is None:
        return start
    if start.only(frozenset({"core"})):
        raise ConfigError(
            f"{method.name} trains cores between factors of its own making, which an adapter from "
            "elsewhere has not: leave out lora.init_from"
        )
    return start | read_adapter(config.root / config.lora.init_from, base.specs)
