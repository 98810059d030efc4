"""What can be learned: kinds of task by name, and the record of functions that a task is.

A kind is known before any model is loaded: the columns it reads, the model it needs, its metrics.
Its task turns rows into tokens, a model's outputs into a loss, and outputs into metrics. An
installed package adds a kind by an entry point of the group ``rolora.tasks``, which names a
function without arguments that returns the :class:`TaskKind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from rolora.data.examples import Batch, Examples
from rolora.errors import ConfigError, nearest
from rolora.registry import Registry

Head = Literal["classification", "causal_lm"]

TASKS = Registry(
    kind="task",
    group="rolora.tasks",
    own={
        "classification": "rolora.tasks.kinds:classification",
        "causal_lm": "rolora.tasks.kinds:causal_lm",
        "choice": "rolora.tasks.kinds:choice",
    },
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of fine-tuning on one model, as a record of functions.

    ``encode(table, source)`` tokenises a pyarrow table for training, one example per table row;
    ``encode_test(table, source)`` for evaluation, where a table row may become several (a question
    one per choice). ``loss(model, batch)`` gives per row a summed loss and the number of terms in
    that sum, both (rows,), so that a client's loss is Σ loss / Σ count over its own rows;
    ``outputs(model, batch)`` gives (rows, width) float32 for ``score(outputs, examples)``, which
    returns the metrics of an ``encode_test``.
    """

    encode: Callable[[Any, str], Examples]
    encode_test: Callable[[Any, str], Examples]
    loss: Callable[[Any, Batch], tuple[Tensor, Tensor]]
    outputs: Callable[[Any, Batch], Tensor]
    score: Callable[[Tensor, Examples], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """What is known of a task before its model is loaded.

    ``head``: "classification" for a model with one output per class, whose rows carry a label, or
    "causal_lm" for one that predicts tokens. ``columns`` lists the keys of ``[data]`` that name the
    columns it reads; of several alternatives a run gives one. ``beside`` maps further keys, which
    may be left out, to the key that they go with. ``metrics`` maps each metric of
    ``Task.score`` to whether higher is better, the main one first; ``answers`` does so for the
    metrics of generated answers, and is empty where the task generates none.
    ``make(base, columns, labels, max_length)`` makes the task: a ``rolora.model.base.Base``, key
    of ``[data]`` -> column, the class labels (empty without), and a row's most tokens.
    """

    name: str
    head: Head
    columns: Sequence[Sequence[str]]
    metrics: Mapping[str, bool]
    make: Callable[[Any, Mapping[str, Any], Sequence[str], int], Task]
    answers: Mapping[str, bool] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Whether each row has a class label, which all clients have to agree on."""
        return self.head == "classification"

    def chosen(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """What ``data``, the keys of ``[data]``, gives this task to read.

        Raises ConfigError unless they are those of exactly one alternative.
        """
        read = {*(key for keys in self.columns for key in keys), *self.beside}
        if unknown := sorted(read - data.keys()):
            hint = nearest(unknown[0], data)
            raise ConfigError(f"task {self.name!r} reads data.{unknown[0]}, an unknown key: {hint}")
        given = [keys for keys in self.columns if all(data[key] is not None for key in keys)]
        if len(given) != 1:
            ways = [_listed([f"data.{key}" for key in keys]) for keys in self.columns]
            either = "either " if len(ways) > 1 else ""
            raise ConfigError(f"task {self.name!r} needs {either}{', or '.join(ways)}")
        also = [key for key, main in self.beside.items() if main in given[0]]
        return {key: data[key] for key in (*given[0], *also) if data[key] is not None}


def task_kind(name: str) -> TaskKind:
    """The kind of this name. Raises ConfigError with the nearest known name if there is none."""
    kind: TaskKind = TASKS.factory(name)()
    if kind.name != name:
        raise ConfigError(
            f"task {name!r} calls itself {kind.name!r}: its TaskKind needs name={name!r}"
        )
    return kind


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric of any known task is better. Raises ConfigError for another."""
    for name in sorted(TASKS.names(), key=lambda name: name not in TASKS.own):
        kind = task_kind(name)
        for known in (kind.metrics, kind.answers):
            if metric in known:
                return known[metric]
    raise ConfigError(f"no installed task measures {metric!r}: install the package of its task")


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
