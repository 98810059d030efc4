"""The kinds of task that come with rolora. Their modules load when a task is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from rolora.tasks.registry import Task, TaskKind


def _made_by(module: str, function: str, *, labelled: bool = False) -> Callable[..., Task]:
    """``TaskKind.make`` by this function, whose module loads when a task is made."""

    def make(base: Any, columns: Mapping[str, Any], labels: Sequence[str], limit: int) -> Task:
        known = {"labels": labels} if labelled else {}
        made = getattr(import_module(f"rolora.tasks.{module}"), function)
        task: Task = made(base, **known, **columns, max_length=limit)
        return task

    return make


def classification() -> TaskKind:
    """Telling labels apart in one or two columns of text."""
    return TaskKind(
        name="classification",
        head="classification",
        columns=[("text", "label")],
        beside={"positive": "label"},
        metrics={"accuracy": True, "macro_f1": True, "matthews": True, "loss": False, "f1": True},
        make=_made_by("classification", "classification", labelled=True),
    )


def multi_label() -> TaskKind:
    """Telling which labels, any number of them, one or two columns of text have."""
    return TaskKind(
        name="multi_label",
        head="multi_label",
        columns=[("text", "label")],
        beside={"separator": "label"},
        metrics={"micro_f1": True, "macro_f1": True, "subset_accuracy": True, "loss": False},
        make=_made_by("classification", "multi_label", labelled=True),
    )


def regression() -> TaskKind:
    """Predicting a number from one or two columns of text."""
    return TaskKind(
        name="regression",
        head="regression",
        columns=[("text", "label")],
        metrics={"pearson": True, "spearman": True, "mean_absolute_error": False, "loss": False},
        make=_made_by("classification", "regression"),
    )


def causal_lm() -> TaskKind:
    """Writing the completion of a prompt, a text alone, or the assistant's turns of a chat."""
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
        make=_made_by("causal_lm", "causal_lm"),
    )


def choice() -> TaskKind:
    """Picking the right one of several answers."""
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
        make=_made_by("choice", "choice"),
    )


def preference() -> TaskKind:
    """Preferring one completion of a prompt to another, or wanted completions to unwanted ones."""
    return TaskKind(
        name="preference",
        head="causal_lm",
        columns=[("chosen", "rejected"), ("prompt", "completion", "label")],
        beside={"prompt": "chosen", "separator": "prompt", "date": ("chosen", "completion")},
        section="preference",
        compares=True,
        metrics={"accuracy": True, "margin": True, "loss": False},
        make=_made_by("preference", "preference"),
    )
