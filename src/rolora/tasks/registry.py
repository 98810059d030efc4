"""What is learned: a task turns rows into tokens, outputs into a loss, and answers into metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rolora.data.examples import Batch, Examples, collate

__all__ = ["Batch", "Examples", "Task", "collate"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of fine-tuning, as a record of functions.

    ``encode(table, source)`` tokenises a pyarrow table for training, one example per table row;
    ``encode_test(table, source)`` for evaluation, where a table row may become several (a question
    one per choice). ``loss(model, batch)`` gives per row a summed loss and how many things it was
    summed over, both (rows,), so that a client's loss is Σ loss / Σ count over its own rows;
    ``outputs(model, batch)`` gives (rows, width) float32 for ``score(outputs, examples)``, which
    returns ``metrics`` (the first is the main one) of an ``encode_test``.
    """

    name: str
    metrics: tuple[str, ...]
    encode: Callable[[Any, str], Examples]
    encode_test: Callable[[Any, str], Examples]
    loss: Callable[[Any, Batch], tuple[Tensor, Tensor]]
    outputs: Callable[[Any, Batch], Tensor]
    score: Callable[[Tensor, Examples], dict[str, float]]


HIGHER_IS_BETTER = {
    "accuracy": True,
    "macro_f1": True,
    "matthews": True,
    "choice_accuracy": True,
    "choice_accuracy_norm": True,
    "answer_accuracy": True,
    "exact_match": True,
    "loss": False,
    "perplexity": False,
}
