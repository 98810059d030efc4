"""Kinds of task by name, and the task itself, a record of functions.

A kind is known before any model is loaded: the columns it reads, the model it needs, its metrics.
Its task turns rows into tokens, a model's outputs into a loss, and outputs into metrics. An
installed package adds a kind by an entry point of the group ``rolora.tasks``, which names a
function without arguments that returns the :class:`TaskKind`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rolora.data.labels import class_labels, in_order
from rolora.errors import ConfigError, nearest
from rolora.registry import Registry, attributes

if TYPE_CHECKING:
    from torch import Tensor

    from rolora.data.examples import Batch, Examples
    from rolora.model.peft import Kind

    Predict = Callable[[Any, str, Callable[[Examples], Tensor], int], list[dict[str, Any]]]

TASKS = Registry(
    kind="task",
    group="rolora.tasks",
    own=attributes(
        "rolora.tasks",
        {
            "kinds": (
                *("classification", "multi_label", "regression"),
                *("causal_lm", "choice", "preference"),
            )
        },
    ),
)

# keys of [data] that tasks read and that name no column
NO_COLUMNS = ("separator", "date", "positive")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of fine-tuning on one model, as a record of functions.

    ``encode(table, source)`` tokenises a pyarrow table for training, one example per table row;
    ``encode_test(table, source)`` for evaluation, where a table row may become several (a question
    one per choice). ``loss(model, batch)`` gives per row a summed loss and the number of terms in
    that sum, both (rows,), so that a client's loss is Σ loss / Σ count over its own rows;
    ``outputs(model, batch)`` gives (rows, width) float32 for ``score(outputs, examples)``, which
    returns the metrics of an ``encode_test``. ``predict(table, source, outputs, max_new_tokens)``
    gives a dict per table row, which needs no right answer, while the bank holds the adapter;
    ``outputs(examples)`` gives (rows, width) for them. None: the task makes no predictions.
    ``recall(outputs, examples)`` maps each label that rows of an ``encode_test`` have, in the order
    of the labels, to the share of these rows for which it is predicted. None: there are no labels.
    """

    encode: Callable[[Any, str], Examples]
    encode_test: Callable[[Any, str], Examples]
    loss: Callable[[Any, Batch], tuple[Tensor, Tensor]]
    outputs: Callable[[Any, Batch], Tensor]
    score: Callable[[Tensor, Examples], dict[str, float]]
    predict: Predict | None = None
    recall: Callable[[Tensor, Examples], dict[str, float]] | None = None


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """What is known of a task before its model is loaded.

    ``head``: "classification" for a model with one output per class, of which a row has one,
    "multi_label" where it has any number, "regression" for one output, or "causal_lm" for a model
    that predicts tokens. ``columns`` lists the keys of ``[data]`` that name the
    columns it reads; of several alternatives a run gives one. ``beside`` maps further keys, which
    may be left out, to the key, or each of the keys, that they go with. ``section`` names the
    table of the configuration whose keys ``make`` is given with the columns. ``compares``:
    whether a row is two token sequences, whose loss needs ``Examples.reference``. ``metrics`` maps
    each metric of ``Task.score`` to whether higher is better, the main one first; ``answers`` does
    so for the metrics of generated answers, and is empty where the task generates none.
    ``make(base, columns, labels, max_length)`` makes the task: a ``rolora.model.base.Base``, key
    of ``[data]`` -> column, the class labels (empty without), and a row's most tokens.
    """

    name: str
    head: Kind
    columns: Sequence[Sequence[str]]
    metrics: Mapping[str, bool]
    make: Callable[[Any, Mapping[str, Any], Sequence[str], int], Task]
    answers: Mapping[str, bool] = field(default_factory=dict)
    beside: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    section: str | None = None
    compares: bool = False

    def __post_init__(self) -> None:
        for metric in (*self.metrics, *self.answers):
            if "/" in metric:  # "accuracy/second" is accuracy on second test rows
                raise ConfigError(f"task {self.name!r}: a metric's name has no '/': {metric!r}")

    @property
    def labelled(self) -> bool:
        """Whether rows have classes, whose names all clients have to agree on."""
        return self.head in ("classification", "multi_label")

    def columns_read(self, data: Mapping[str, Any]) -> list[str]:
        """The columns that are read with these keys of ``[data]``, each once; see ``chosen``."""
        chosen = self.chosen(data)
        each = [value for key, value in chosen.items() if key not in NO_COLUMNS]
        return list(dict.fromkeys(n for v in each for n in ([v] if isinstance(v, str) else v)))

    def classes(self, table: Any, columns: Mapping[str, Any], source: str) -> list[list[str]]:
        """The names of each row's classes; ``columns``: key of ``[data]`` -> column."""
        from rolora.data import tables  # pyarrow: more than is needed to know a task

        label = columns["label"]
        if self.head == "multi_label":
            return tables.label_sets(table, label, columns.get("separator"), source)
        return [[name] for name in tables.labels(table, label, source)]

    def labels(self, table: Any, columns: Mapping[str, Any], source: str) -> list[str]:
        """The names of all classes in these rows, in order; empty for a task without."""
        if not self.labelled:
            return []
        rows = self.classes(table, columns, source)
        switches = columns["label"] if isinstance(columns["label"], list) else []
        return in_order([*switches, *(name for row in rows for name in row)])

    def vocabulary(self, names: Iterable[str], source: str) -> list[str]:
        """The labels of a run whose rows have classes of these names, in order; see ``labels``.

        Raises DataError if they are too few to learn, or numbers that are not whole.
        """
        if not self.labelled:
            return []
        return class_labels(names, source, fewest=2 if self.head == "classification" else 1)

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
        if isinstance(data.get("label"), list) and self.head != "multi_label":
            raise ConfigError(
                f"data.label names several columns, and task {self.name!r} reads one: name it, or "
                "set model.task = 'multi_label'"
            )
        found = {key: data[key] for key in given[0]}
        for key in self.beside:
            if self.goes_with(key, found) and data[key] is not None:
                found.setdefault(key, data[key])
        return found

    def goes_with(self, key: str, chosen: Iterable[str]) -> bool:
        """Whether a key of ``beside`` goes with the keys that a run gives."""
        mains = self.beside.get(key, ())
        return not {mains, *mains}.isdisjoint(chosen)


def neighbour(completion: str) -> str:
    """The column of the completions of other rows of the same client, of a column of completions:
    where it is left out, a row takes that of the row before it."""
    return f"{completion} of the row before"


def task_kind(name: str) -> TaskKind:
    """The kind of this name. Raises ConfigError with the nearest known name if there is none."""
    kind: TaskKind = TASKS.factory(name)()
    if kind.name != name:
        raise ConfigError(
            f"task {name!r} calls itself {kind.name!r}: its TaskKind needs name={name!r}"
        )
    return kind


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric of any known task is better, whichever rows it is measured on
    ("accuracy/second"). Raises ConfigError for another."""
    metric = metric.partition("/")[0]
    for name in sorted(TASKS.names(), key=lambda name: name not in TASKS.own):
        kind = task_kind(name)
        for known in (kind.metrics, kind.answers):
            if metric in known:
                return known[metric]
    raise ConfigError(f"no installed task measures {metric!r}: install the package of its task")


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
