"""What the tables of a configuration mean for the model and for training; nothing is loaded."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch

from rolora.config.schema import DataConfig, LoraConfig, RunConfig, TrainConfig
from rolora.model.peft import LoraSettings
from rolora.tasks.registry import task_kind
from rolora.training.settings import LocalSettings


def base_dtype(wanted: str, device: str) -> torch.dtype:
    """What the base is loaded in for this ``model.dtype``, before any measurement."""
    half = wanted == "bf16" or (wanted == "auto" and device == "cuda")
    return torch.bfloat16 if half else torch.float32


def lora_settings(lora: LoraConfig) -> LoraSettings:
    """Where and how large the configured adapters are."""
    targets = lora.target_modules
    return LoraSettings(
        rank=lora.largest,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        layers=lora.layers if isinstance(lora.layers, str) else tuple(lora.layers),
        rslora=lora.rslora,
    )


def local_settings(train: TrainConfig) -> LocalSettings:
    """How the configured clients train in a round."""
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
        head_lr_ratio=train.head_lr_ratio,
    )


def revisits(train: TrainConfig, sizes: Sequence[int]) -> bool:
    """Whether training sees each row at least once on average; ``sizes`` are those of shards."""
    settings = local_settings(train)
    visits = sum(settings.num_steps(size) * min(size, train.batch_size) for size in sizes)
    return train.rounds * train.participation * visits >= sum(sizes)


def dated(config: RunConfig, day: datetime.date | str | None = None) -> RunConfig:
    """The configuration with the date that chat templates are given: its own, else ``day``, else
    today. Unchanged for a run that cannot have chats."""
    data, kind = config.data, task_kind(config.model.task)
    if data.date is not None or not kind.goes_with("date", kind.chosen(dict(data))):
        return config
    given = {**data.model_dump(), "date": day or datetime.date.today()}
    return config.model_copy(update={"data": DataConfig.model_validate(given)})
