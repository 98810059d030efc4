"""A few clients with tiny models: rows of unequal lengths, shards of unequal sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from states import random_state, start_of
from tiny import SENTENCES

from rolora.algorithm.adapter import AdapterState, Roles
from rolora.algorithm.method import Method
from rolora.data.examples import Examples
from rolora.methods import get_method
from rolora.model.base import Base, load_base
from rolora.model.peft import LoraSettings
from rolora.run.experiment import ready
from rolora.tasks.causal_lm import causal_lm
from rolora.tasks.classification import classification
from rolora.tasks.preference import preference
from rolora.tasks.registry import Task
from rolora.training.local import Trained, Work, train_group
from rolora.training.reference import references
from rolora.training.settings import LocalSettings

ROWS = 32
LABELS = ("bad", "good", "odd")
EVERYTHING: Roles = frozenset({"A", "B", "head"})
SHARDS = {  # rows of each client: with batches of 4, short last batches and 2, 1, 4 and 1 steps
    "ann": torch.arange(0, 6),
    "bob": torch.arange(6, 9),
    "cat": torch.arange(9, 22),
    "dan": torch.arange(22, 23),
}


@dataclass(frozen=True)
class Bench:
    """A model, its task, and encoded rows."""

    base: Base
    task: Task
    examples: Examples

    def start(self, seed: int = 0, scale: float = 0.2) -> AdapterState:
        """A random adapter, lora_B too, in the model's dtype."""
        dtype = next(self.base.model.parameters()).dtype
        return random_state(self.base.specs, seed, dtype, scale)

    def start_of(self, method: Method, seed: int = 0, scale: float = 0.2) -> AdapterState:
        """The same, with the tensors of this method."""
        dtype = next(self.base.model.parameters()).dtype
        return start_of(method, self.base.specs, seed, dtype, scale)

    def work(self, settings: LocalSettings, same_start: bool = False) -> list[Work]:
        """Each client's part of a round; every client starts elsewhere, unless told."""
        return [
            Work(name, rows, self.start(0 if same_start else i), settings.num_steps(len(rows)))
            for i, (name, rows) in enumerate(SHARDS.items())
        ]

    def train(
        self,
        work: Sequence[Work],
        settings: LocalSettings,
        trainable: Callable[[int], Roles] = lambda step: EVERYTHING,
        lr: float = 5e-3,
        round: int = 1,
        method: Method | None = None,
    ) -> list[Trained]:
        """These clients side by side, as the method trains them if one is given."""
        if method is None:
            method = replace(get_method("fedit"), trainable=lambda round, step: trainable(step))
        return train_group(
            self.base,
            self.task,
            self.examples,
            work,
            method,
            settings,
            lr=lr,
            seed=7,
            round=round,
        )


def classifier(
    folder: Path, dtype: torch.dtype = torch.float64, devices: Sequence[Any] = (), **lora: Any
) -> Bench:
    """Three labels on a model saved in ``folder``."""
    settings = LoraSettings(**{"rank": 2, **lora})
    base = load_base(
        str(folder), "classification", settings, labels=LABELS, dtype=dtype, devices=devices
    )
    task = classification(base, LABELS, ["text"], "label", 32)
    table = pa.table({"text": _texts(), "label": [LABELS[i % 3] for i in range(ROWS)]})
    return Bench(base, task, task.encode(table, "rows"))


def language_model(
    folder: Path, dtype: torch.dtype = torch.float64, devices: Sequence[Any] = (), **lora: Any
) -> Bench:
    """Completions of prompts on a model saved in ``folder``."""
    settings = LoraSettings(**{"rank": 2, **lora})
    base = load_base(str(folder), "causal_lm", settings, dtype=dtype, devices=devices)
    task = causal_lm(base, prompt="ask", completion="say", messages=None, max_length=48)
    table = pa.table({"ask": _texts(), "say": [f" {text[::-1]}" for text in reversed(_texts())]})
    return Bench(base, task, task.encode(table, "rows"))


def preferences(folder: Path, dtype: torch.dtype = torch.float64, **given: Any) -> Bench:
    """Pairs of completions, or for kto labelled ones, on a model saved in ``folder``."""
    lora = {key: given.pop(key) for key in ("rank", "dropout") if key in given}
    base = load_base(str(folder), "causal_lm", LoraSettings(**{"rank": 2, **lora}), dtype=dtype)
    loss = given.setdefault("loss", "dpo")
    columns: dict[str, Any] = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
    if loss == "kto":
        columns = {"prompt": "ask", "completion": "yes", "label": "fine"}
    columns |= {"beta": 0.5, "label_smoothing": 0.0, "max_length": 48}
    task = preference(base, **columns, **given)
    texts = _texts()
    table = pa.table(
        {
            "ask": texts,
            "yes": [f" {text[::-1]}" for text in reversed(texts)],
            "no": [f" {text} and" for text in reversed(texts)],
            "fine": [i % 3 > 0 for i in range(ROWS)],
        }
    )
    task = ready(task, lambda found, _: references(base, task, None)(found))
    return Bench(base, task, task.encode(table, "rows"))


def _texts() -> list[str]:
    """Texts of 2 to 10 words, all different."""
    words = [sentence.split() for sentence in SENTENCES]
    return [" ".join((words[i % 5] * 2)[i % 4 : i % 4 + 2 + i * 7 % 9]) for i in range(ROWS)]
