"""The kinds of task that come with rolora. Their modules load when a task is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rolora.tasks.registry import Task, TaskKind


def classification() -> TaskKind:
    """Telling labels apart in one or two columns of text."""

    def make(base: Any, columns: Mapping[str, Any], labels: Sequence[str], limit: int) -> Task:
        from rolora.tasks.classification import classification

        text = columns["text"]
        text = [text] if isinstance(text, str) else text
        return classification(base, labels, text, columns["label"], limit)

    return TaskKind(
        name="classification",
        head="classification",
        columns=[("text", "label")],
        metrics={"accuracy": True, "macro_f1": True, "matthews": True, "loss": False},
        make=make,
    )


def causal_lm() -> TaskKind:
    """Writing the completion of a prompt, or the assistant's turns of a chat."""

    def make(base: Any, columns: Mapping[str, Any], labels: Sequence[str], limit: int) -> Task:
        from rolora.tasks.causal_lm import causal_lm

        return causal_lm(base, max_length=limit, **columns)

    return TaskKind(
        name="causal_lm",
        head="causal_lm",
        columns=[("prompt", "completion"), ("messages",)],
        beside={"separator": "prompt", "tools": "messages", "date": "messages"},
        metrics={"perplexity": False, "loss": False},
        answers={"exact_match": True, "answer_accuracy": True},
        make=make,
    )


def choice() -> TaskKind:
    """Picking the right one of several answers."""

    def make(base: Any, columns: Mapping[str, Any], labels: Sequence[str], limit: int) -> Task:
        from rolora.tasks.choice import choice

        return choice(base, max_length=limit, **columns)

    return TaskKind(
        name="choice",
        head="causal_lm",
        columns=[("prompt", "choices", "answer")],
        beside={"separator": "prompt"},
        metrics={
            "choice_accuracy": True,
            "choice_accuracy_norm": True,
            "perplexity": False,
            "loss": False,
        },
        make=make,
    )
