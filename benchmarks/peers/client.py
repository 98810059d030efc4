"""The client that every peer trains: PEFT's own LoRA model, a fresh AdamW, the job's batches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

Batch = dict[str, Tensor]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Job:
    """A job folder, read: settings, start adapter, batches by "round/client/step", test batches."""

    settings: dict[str, Any]
    start: Tensors
    batches: dict[str, Batch]
    test: list[Batch]
    curve: list[Any] = field(default_factory=list)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Per round, what is ``trainable`` and the ``cohort`` of clients."""
        found: list[dict[str, Any]] = self.settings["rounds"]
        return found

    @property
    def client_steps(self) -> int:
        """Optimiser steps over all clients and rounds."""
        return sum(client["steps"] for plan in self.rounds for client in plan["cohort"])

    def of(self, number: int, client: Mapping[str, Any]) -> list[Batch]:
        """The batches of a client in a round, from 1, in order."""
        return [self.batches[f"{number}/{client['id']}/{step}"] for step in range(client["steps"])]

    def evaluated(self, number: int) -> bool:
        """Whether the job asks for the accuracy after this round."""
        return number in self.settings["evaluated"]


def read_job(folder: str, *, actor: bool = False) -> Job:
    """Read a job folder and set torch's threads to the job's, or an actor's share of them."""
    settings = json.loads((Path(folder) / "job.json").read_text())
    processes = settings["actors"] if actor else 1
    torch.set_num_threads(max(1, settings["threads"] // processes))
    test = _grouped(load_file(Path(folder) / "test.safetensors"))
    return Job(
        settings,
        load_file(Path(folder) / "start.safetensors"),
        _grouped(load_file(Path(folder) / "batches.safetensors")),
        [test[str(index)] for index in range(len(test))],
    )


def _grouped(tensors: Tensors) -> dict[str, Batch]:
    groups: dict[str, Batch] = {}
    for name, tensor in tensors.items():
        group, _, key = name.rpartition(".")
        groups.setdefault(group, {})[key] = tensor
    return groups


def peft_model(job: Job) -> Any:
    """The base model with PEFT's LoRA and a trainable head, without dropout, in eval mode.

    PEFT keeps factors in float32 beside a bfloat16 base; the head is the base's.
    """
    transformers.utils.logging.set_verbosity_error()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        job.settings["model"],
        num_labels=job.settings["labels"],
        dtype=job.settings["dtype"],
        local_files_only=True,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=job.settings["rank"],
        lora_alpha=job.settings["alpha"],
        target_modules=job.settings["target_modules"],
        layers_to_transform=job.settings["layers"],
    )
    return peft.get_peft_model(base, config).eval()


def role(name: str) -> str:
    """ "A" or "B" for the LoRA factors, "head" for the rest."""
    return "A" if "lora_A" in name else "B" if "lora_B" in name else "head"


def moving(tensors: Tensors, trainable: Sequence[str]) -> dict[str, Tensor]:
    """Those of the tensors that this round trains and sends."""
    return {name: tensor for name, tensor in tensors.items() if role(name) in trainable}


def freeze(model: Any, trainable: Sequence[str]) -> None:
    """Let gradients reach the trainable roles only. PEFT freezes whole adapters, not one factor."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.requires_grad_(role(name) in trainable)


def optimizer(model: Any, job: Job) -> torch.optim.Optimizer:
    """A fresh AdamW over what has gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=job.settings["lr"], weight_decay=0.0)


def train(model: Any, steps: Sequence[Batch], adamw: torch.optim.Optimizer) -> None:
    """One optimiser step a batch."""
    for batch in steps:
        adamw.zero_grad()
        model(**batch).loss.backward()
        adamw.step()


def accuracy(model: Any, job: Job) -> float:
    """Of the model as it is, on the job's test rows."""
    right = total = 0
    with torch.inference_mode():
        for batch in job.test:
            inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
            guess = model(**inputs).logits.argmax(dim=1)
            right += int((guess == batch["labels"]).sum())
            total += len(guess)
    return right / total


def mean(updates: Sequence[tuple[Tensors, float]]) -> dict[str, Tensor]:
    """The weighted mean of clients' tensors."""
    whole = sum(weight for _, weight in updates)
    return {
        name: torch.stack([tensors[name] * (weight / whole) for tensors, weight in updates]).sum(0)
        for name in updates[0][0]
    }
