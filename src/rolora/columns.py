"""What the columns of a table look like, and which of them a run would use.

The guess is a start for people to correct: it goes by usual column names first, then by content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from rolora.data import as_numbers, decoded, is_number, is_text
from rolora.errors import DataError

Kind = Literal["text", "category", "number", "messages", "list", "other"]


@dataclass(frozen=True)
class Column:
    """What a column looks like. ``mean_length`` counts characters, or the items of a list."""

    name: str
    kind: Kind
    distinct: int
    example: str
    mean_length: float


def describe(table: pa.Table) -> list[Column]:
    """One :class:`Column` for each column of ``table``, in order."""
    return [_describe(name, decoded(table[name])) for name in table.column_names]


def _describe(name: str, values: pa.ChunkedArray) -> Column:
    values = as_numbers(values).drop_null()
    rows, kind = len(values), values.type
    example = " ".join(str(values[0]).split())[:60] if rows else ""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = kind.value_type
        fields = {field.name for field in item} if pa.types.is_struct(item) else set()
        shape: Kind = "messages" if {"role", "content"} <= fields else "list"
        distinct = len({repr(value) for value in values.to_pylist()})
        return Column(name, shape, distinct, example, _mean(pc.list_value_length(values)))
    scalar = is_text(kind) or is_number(kind) or pa.types.is_boolean(kind)
    if not scalar:
        distinct = len({repr(value) for value in values.to_pylist()})
        return Column(name, "other", distinct, example, 0.0)
    distinct = pc.count_distinct(values).as_py()
    length = _mean(pc.utf8_length(values.cast(pa.string())))
    whole = not pa.types.is_floating(kind) or pc.all(pc.equal(values, pc.round(values))).as_py()
    if whole and 2 <= distinct <= 100 and 2 * distinct <= rows and length <= 40:
        return Column(name, "category", distinct, example, length)
    return Column(name, "number" if is_number(kind) else "text", distinct, example, length)


def _mean(values: pa.ChunkedArray) -> float:
    return float(pc.mean(values).as_py() or 0.0)


@dataclass(frozen=True)
class Guess:
    """The task that a table seems to hold, and its columns; ``None`` where the task has no use.

    classification: ``text`` and ``label``. causal_lm: ``messages``, or ``prompt`` and
    ``completion``. choice: ``prompt``, ``choices`` and ``answer``.
    """

    task: Literal["classification", "causal_lm", "choice"]
    text: tuple[str, ...] | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    choices: str | None = None
    answer: str | None = None


TEXT_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("text1", "text2"),
)
TEXT = ("text", "sentence", "content", "review", "tweet", "message", "comment", "question", "body")
LABEL = ("label", "labels", "class", "target", "category", "sentiment", "intent", "topic", "answer")
PROMPT = ("prompt", "instruction", "question", "query", "problem", "input")
COMPLETION = ("completion", "response", "output", "answer", "target", "solution", "chosen")
MESSAGES = ("messages", "conversations", "conversation", "chat", "dialog")
CHOICES = ("choices", "options", "endings", "answers")
ANSWER = ("answer", "label", "answerkey", "target", "correct", "gold")


def guess_columns(table: pa.Table) -> Guess:
    """The task and its columns, by name and then by kind.

    In order: a column of messages; a list of choices with an answer and a prompt; a prompt with a
    text completion; a class label with one or two texts. Raises DataError if nothing fits.
    """
    columns = describe(table)

    def called(names: Sequence[str], *kinds: Kind) -> str | None:
        own = {_bare(column.name): column.name for column in columns if column.kind in kinds}
        return next((own[name] for name in names if name in own), None)

    messages = called(MESSAGES, "messages") or next(
        (column.name for column in columns if column.kind == "messages"), None
    )
    if messages:
        return Guess("causal_lm", messages=messages)

    choices, answer = called(CHOICES, "list"), called(ANSWER, "category", "number", "text")
    prompt = called(PROMPT, "text", "category")
    if choices and answer and prompt:
        return Guess("choice", prompt=prompt, choices=choices, answer=answer)

    completion = called(COMPLETION, "text")
    label = called(LABEL[:3], "category") or called(LABEL, "category") or _class_like(columns)
    if prompt and completion and prompt != completion and label != called(LABEL[:3], "category"):
        return Guess("causal_lm", prompt=prompt, completion=completion)
