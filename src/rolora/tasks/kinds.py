"""The kinds of task that come with rolora. Their modules load when a task is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rolora.tasks.registry import Task, TaskKind


def classification() -> TaskKind:
    """Telling labels apart in one or two columns of text."""

    def make(base: Any, columns: Mapping[str, Any], labels: Sequence[str], limit: int) -> Task:
        from rolora.tasks.classification import classification

        return classification(base, labels, max_length=limit, **columns)

    return TaskKind(
        name="classification",
        head="classification",
        columns=[("text", "label")],
        beside={"positive": "label"},
        metrics={"accuracy": True, "macro_f1": True, "matthews": True, "loss": False, "f1": True},
        make=make,
    )


def multi_label() -> TaskKind:
    """Telling which labels, any number of them, one or two columns of text have."""

    def make(base: Any, columns: Mapping[str, Any], labels: Sequence[str], limit: int) -> Task:
        from rolora.tasks.classification import multi_label

        return multi_label(base, labels, max_length=limit, **columns)

    return TaskKind(
        name="multi_label",
        head="multi_label",
        columns=[("text", "label")],
        beside={"separator": "label"},
        metrics={"micro_f1": True, "macro_f1": True, "subset_accuracy": True, "loss": False},
        make=make,
    )


def regression() -> TaskKind:
    """Predicting a number from one or two columns of text."""

    def make(base: Any, columns: Mapping[str, Any], labels: Sequence[str], limit: int) -> Task:
        from rolora.tasks.classification import regression

        return regression(base, max_length=limit, **columns)

    return TaskKind(
        name="regression",
        head="regression",
        columns=[("text", "label")],
        metrics={"pearson": True, "spearman": True, "mean_absolute_error": False, "loss": False},
        make=make,
    )


def causal_lm() -> TaskKind:
    """Writing the completion of a prompt, a text alone, or the assistant's turns of a chat."""

    def make(base: Any, columns: Mapping[str, Any], labels: Sequence[str], limit: int) -> Task:
        from rolora.tasks.causal_lm import causal_lm

        return causal_lm(base, max_length=limit, **columns)

    return TaskKind(
        name="causal_lm",
        head="causal_lm",
        columns=[("completion",), ("messages",)],
        beside={
            "prompt": "completion",
            "separator": "prompt",
            "tools": "messages",
            "date": ("messages", "completion"),
        },
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


def preference() -> TaskKind:
    """Preferring one completion of a prompt to another, or wanted completions to unwanted ones."""

    def make(base: Any, columns: Mapping[str, Any], labels: Sequence[str], limit: int) -> Task:
        from rolora.tasks.preference import preference

        return preference(base, max_length=limit, **columns)

    return TaskKind(
        name="preference",
        head="causal_lm",
        columns=[("chosen", "rejected"), ("prompt", "completion", "label")],
        beside={"prompt": "chosen", "separator": "prompt", "date": ("chosen", "completion")},
        section="preference",
        compares=True,
        metrics={"accuracy": True, "margin": True, "loss": False},
        make=make,
    )
