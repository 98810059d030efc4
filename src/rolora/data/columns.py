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
    if is_text(kind) or is_number(kind) or pa.types.is_boolean(kind):
        distinct = pc.count_distinct(values).as_py()
        length = _mean(pc.utf8_length(values.cast(pa.string())))
        whole = not pa.types.is_floating(kind) or pc.all(pc.equal(values, pc.round(values))).as_py()
        found: Kind = "number" if is_number(kind) else "text"
        if whole and 2 <= distinct <= 100 and 2 * distinct <= rows and length <= 40:
            found = "category"
        return Column(name, found, distinct, example, length)
    distinct = len({repr(value) for value in values.to_pylist()})
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return Column(name, "other", distinct, example, 0.0)
    item = kind.value_type
    fields = {field.name for field in item} if pa.types.is_struct(item) else set()
    found = "messages" if {"role", "content"} <= fields else "list"
    return Column(name, found, distinct, example, _mean(pc.list_value_length(values)))


def _mean(values: pa.ChunkedArray) -> float:
    return float(pc.mean(values).as_py() or 0.0)


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
ANSWER = ("answer", "label", "answerkey", "target", "correct", "gold")


def guess_columns(table: pa.Table) -> tuple[str, dict[str, str | list[str]]]:
    """The task that a table seems to be for, and key of ``[data]`` -> its column or columns.

    In order: a column of messages; a list of choices with an answer and a prompt; a prompt with a
    text completion and no column named like a label; a class label with one or two texts. Raises
    DataError if nothing fits.
    """
    columns = describe(table)

    def called(names: Sequence[str], *kinds: Kind) -> str | None:
        """The column of one of ``kinds`` whose name comes first in ``names``."""
        own = {_bare(column.name): column.name for column in columns if column.kind in kinds}
        return next((own[name] for name in names if name in own), None)

    chats = [column.name for column in columns if column.kind == "messages"]
    if chats:
        return "causal_lm", {"messages": called(MESSAGES, "messages") or chats[0]}

    prompt = called(PROMPT, "text", "category")
    choices, answer = called(CHOICES, "list"), called(ANSWER, "category", "number", "text")
    if prompt and choices and answer:
        return "choice", {"prompt": prompt, "choices": choices, "answer": answer}

    label = called(LABEL, "category", "number", "text")
    completion = called(COMPLETION, "text")
    if prompt and completion and not label and prompt != completion:
        return "causal_lm", {"prompt": prompt, "completion": completion}

    # the category with the fewest values; of several the last, where labels usually are
    categories = [column for column in reversed(columns) if column.kind == "category"]
    fewest = min(categories, key=lambda column: column.distinct).name if categories else None
    label = label or called(CLASS, "category") or fewest
    text = _text_columns([column for column in columns if column.name != label])
    if label and text:
        return "classification", {"text": text, "label": label}
    seen = ", ".join(f"{column.name} ({column.kind})" for column in columns)
    raise DataError(
        "the columns are neither text and label, nor prompt and completion, nor messages: "
        f"{seen}; name them in [data]"
    )


def _text_columns(columns: Sequence[Column]) -> str | list[str] | None:
    """Two columns with the names of a pair, one with a usual name, or the longest text."""
    own = {_bare(c.name): c.name for c in columns if c.kind in ("text", "category")}
    for pair in TEXT_PAIRS:
        if all(name in own for name in pair):
            return [own[name] for name in pair]
    named = next((own[name] for name in TEXT if name in own), None)
    long = [column for column in columns if column.kind == "text"]
    longest = max(long, key=lambda column: column.mean_length).name if long else None
    return named or longest


def _bare(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
