"""What the columns of a table hold, and which of them a run would use.

The guess is for people to correct: it goes by common column names first, then by content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from rolora.data.tables import as_numbers, decoded, is_number, is_text
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
    raw = values.drop_null()
    values = as_numbers(raw)
    rows, kind = len(values), values.type
    example = " ".join(str(raw[0]).split())[:60] if rows else ""
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
    """The task that a table seems to be for, and its columns; ``None`` for those it does not use.

    classification: ``text`` and ``label``. causal_lm: ``messages``, or ``prompt`` and
    ``completion``. choice: ``prompt``, ``choices`` and ``answer``.
    """

    task: str
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
LABEL = ("label", "labels", "class", "coarselabel")
CLASS = ("target", "category", "sentiment", "intent", "topic", "answer")
PROMPT = ("prompt", "instruction", "question", "query", "problem", "input")
COMPLETION = ("completion", "response", "output", "answer", "target", "solution", "chosen")
MESSAGES = ("messages", "conversations", "conversation", "chat", "dialog")
CHOICES = ("choices", "options", "endings", "answers")
READABLE: tuple[Kind, ...] = ("text", "category")
ANSWER = ("answer", "label", "answerkey", "target", "correct", "gold")


def guess_columns(table: pa.Table) -> Guess:
    """The task and its columns, by name and then by kind.

    In order: a column of messages; a list of choices with an answer and a prompt; a prompt with a
    text completion and no column named like a label; a class label with one or two texts. Raises
    DataError if nothing fits.
    """
    columns = describe(table)

    def called(names: Sequence[str], *kinds: Kind) -> str | None:
        """The column of one of ``kinds`` whose name comes first in ``names``."""
        own = {_bare(column.name): column.name for column in columns if column.kind in kinds}
        return next((own[name] for name in names if name in own), None)

    messages = called(MESSAGES, "messages") or _first(columns, "messages")
    if messages:
        return Guess("causal_lm", messages=messages)

    prompt = called(PROMPT, "text", "category")
    choices, answer = called(CHOICES, "list"), called(ANSWER, "category", "number", "text")
    if prompt and choices and answer:
        return Guess("choice", prompt=prompt, choices=choices, answer=answer)

    label = called(LABEL, "category", "number", "text")
    completion = called(COMPLETION, "text")
    if prompt and completion and not label and prompt != completion:
        return Guess("causal_lm", prompt=prompt, completion=completion)

    label = label or called(CLASS, "category") or _fewest_values(columns)
    if label:
        others = [column for column in columns if column.name != label]
        text = _text_columns(others)
        if text:
            return Guess("classification", text=text, label=label)
    seen = ", ".join(f"{column.name} ({column.kind})" for column in columns)
    raise DataError(
        "the columns are neither text and label, nor prompt and completion, nor messages: "
        f"{seen}; name them in [data]"
    )


def _text_columns(columns: Sequence[Column]) -> tuple[str, ...] | None:
    own = {_bare(column.name): column.name for column in columns if column.kind in READABLE}
    for pair in TEXT_PAIRS:
        if all(name in own for name in pair):
            return tuple(own[name] for name in pair)
    named = next((own[name] for name in TEXT if name in own), None)
    if named:
        return (named,)
    long = [column for column in columns if column.kind == "text"]
    return (max(long, key=lambda column: column.mean_length).name,) if long else None


def _first(columns: Sequence[Column], kind: Kind) -> str | None:
    return next((column.name for column in columns if column.kind == kind), None)


def _fewest_values(columns: Sequence[Column]) -> str | None:
    """The category with the fewest values; of several the last, where labels usually are."""
    categories = [column for column in reversed(columns) if column.kind == "category"]
    return min(categories, key=lambda column: column.distinct).name if categories else None


def _bare(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
