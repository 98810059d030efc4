"""What the columns of a table hold, which of them a run would use, and whose row each may be.

The guess is meant to be corrected: it uses common column names first, then content.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from rolora.data.readers import KEPT
from rolora.data.tables import SWITCH, as_numbers, cells, decoded, is_number, is_text
from rolora.errors import DataError

SAMPLE = 10_000  # rows of lists or objects that are looked at
TURNS = ({"role", "content"}, {"from", "value"})
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
    return [_describe(table, name) for name in table.column_names]


def _describe(table: pa.Table, name: str) -> Column:
    values = decoded(table[name])
    if values.type == KEPT or pa.types.is_nested(values.type):
        return _nested(name, [v for v in cells(table.slice(0, SAMPLE), name) if v is not None])
    raw = values.drop_null()
    values = as_numbers(raw)
    rows, kind = len(values), values.type
    example = " ".join(str(raw[0]).split())[:60] if rows else ""
    if is_text(kind) or is_number(kind) or pa.types.is_boolean(kind):
        distinct = pc.count_distinct(values).as_py()
        length = _mean(pc.utf8_length(values.cast(pa.string())))
        whole = _is_whole(values)
        found: Kind = "number" if is_number(kind) else "text"
        if whole and 2 <= distinct <= 100 and 2 * distinct <= rows and length <= 40:
            found = "category"
        return Column(name, found, distinct, example, length)
    distinct = len({repr(value) for value in values.to_pylist()})
    return Column(name, "other", distinct, example, 0.0)


def _nested(name: str, values: Sequence[Any]) -> Column:
    """A column of lists, objects or values of several types."""
    distinct = len({repr(value) for value in values})
    example = " ".join(str(values[0]).split())[:60] if values else ""
    values = [value["text"] if is_lettered(value) else value for value in values]
    lists = [value for value in values if isinstance(value, list)]
    if not values or len(lists) < len(values):
        flat = not any(isinstance(value, list | dict) for value in values)
        return Column(name, "text" if values and flat else "other", distinct, example, 0.0)
    items = [item for value in lists for item in value]
    # one that is no turn is named where chats are read
    chat = any(isinstance(i, dict) and any(turn <= i.keys() for turn in TURNS) for i in items)
    found: Kind = "messages" if chat else "list"
    return Column(name, found, distinct, example, len(items) / len(lists))


def is_lettered(value: Any) -> bool:
    """Whether these are choices as ARC, OpenBookQA and CommonsenseQA have them: {text, label}."""
    lettered = isinstance(value, dict) and value.keys() == {"text", "label"}
    return lettered and all(isinstance(part, list) for part in value.values())


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
SCORE = ("score", "scores", "rating", "stars", "similarity", "relatedness", "value")
CLASS = ("target", "category", "sentiment", "intent", "topic", "answer")
PROMPT = ("prompt", "instruction", "question", "query", "problem", "input", "questionstem", "ctx")
CONTEXT = ("input", "context")
COMPLETION = ("completion", "response", "output", "answer", "target", "solution")
CHOSEN = ("chosen", "preferred", "winner")
REJECTED = ("rejected", "dispreferred", "loser")
# TRL's, Alpaca's and Dolly's: a few different completions do not make them labels
NAMED_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("instruction", "response"))
MESSAGES = ("messages", "conversations", "conversation", "chat", "dialog")
TOOLS = ("tools", "functions")
CHOICES = ("choices", "options", "endings", "answers")
ANSWER = ("answer", "label", "answerkey", "target", "correct", "gold")

SPLIT = ("split", "fold", "subset", "partition")
# words in the names of columns that say whose row it is, or from where
CLIENT = re.compile(
    "account|agency|agent|annotator|author|bank|branch|cent(er|re)|city|client|clinic|company|"
    "country|customer|department|device|domain|facility|hospital|institution|language|office|"
    "organi[sz]ation|owner|patient|person|publisher|region|school|sensor|shop|site|source|speaker|"
    "state|store|subject|team|tenant|user|worker|writer"
)
KEYS = ("id", "uuid", "name", "code", "key", "number", "num", "no", "index", "hash")
LEAST_ROWS = 8  # of a client, on average
MOST_CLIENTS = 1000

Guess = tuple[str, dict[str, str | list[str]]]


def guess_columns(table: pa.Table) -> Guess:
    """The task that a table seems to be for, and key of ``[data]`` -> its column or columns.

    In order: chosen and rejected completions; completions of prompts with a label of true or false;
    a prompt and a completion that are both chats; a column of messages; a list of choices with an
    answer and a prompt; a prompt, of two columns as in Alpaca and Dolly or of one, with a text
    completion and no column named like a label; one or two texts with several classes a row, in a
    list or in columns of 0 and 1, with a number that is not always whole, or with a class; a text
    alone, which is learned as it is. Raises DataError if nothing fits.
    """
    columns = describe(table)

    def called(names: Sequence[str], *kinds: Kind) -> str | None:
        """The column of one of ``kinds`` whose name comes first in ``names``."""
        own = {_bare(column.name): column.name for column in columns if column.kind in kinds}
        return next((own[name] for name in names if name in own), None)

    said: tuple[Kind, ...] = ("text", "category", "messages")
    asked, better, worse = (called(names, *said) for names in (PROMPT, CHOSEN, REJECTED))
    if better and worse:
        pair: dict[str, str | list[str]] = {"chosen": better, "rejected": worse}
        # a prompt of text beside chats is what they begin with
        talks = {column.name: column.kind == "messages" for column in columns}
        if asked and talks[asked] == talks[better]:
            return "preference", {"prompt": asked, **pair}
        return "preference", pair
    said_to, judged = called(COMPLETION[:1], *said), called(LABEL, "category")
    if asked and said_to and judged and _is_switch(table, judged):
        return "preference", {"prompt": asked, "completion": said_to, "label": judged}

    chats = [column.name for column in columns if column.kind == "messages"]
    if asked in chats and said_to in chats:
        return "causal_lm", {"prompt": asked, "completion": said_to}
    if chats:
        tools = called(TOOLS, "list", "text", "category", "other")
        beside: dict[str, str | list[str]] = {"tools": tools} if tools else {}
        return "causal_lm", {"messages": called(MESSAGES, "messages") or chats[0], **beside}

    prompt = called(PROMPT, "text", "category")
    choices, answer = called(CHOICES, "list"), called(ANSWER, "category", "number", "text")
    if prompt and choices and answer:
        return "choice", {"prompt": prompt, "choices": choices, "answer": answer}

    label = called(LABEL, "category", "number", "text")
    completion = called(COMPLETION, "text")
    for first, second in NAMED_PAIRS:
        both = called([first], "text", "category"), called([second], "text", "category")
        if all(both) and not completion:
            prompt, completion = both
    if prompt and completion and not label and prompt != completion:
        context = called(CONTEXT, "text", "category")
        if context and context not in (prompt, completion):
            return "causal_lm", {"prompt": [prompt, context], "completion": completion}
        return "causal_lm", {"prompt": prompt, "completion": completion}

    # the category with the fewest values; of several the last, where labels usually are
    categories = [
        column
        for column in reversed(columns)
        if column.kind == "category" and _bare(column.name) not in SPLIT
    ]
    fewest = min(categories, key=lambda column: column.distinct).name if categories else None
    named = label or called((*CLASS, *SCORE), "category")
    switches = [column.name for column in reversed(categories) if _is_switch(table, column.name)]
    task = "classification"
    chosen: str | list[str] | None = named or fewest
    if several := called(LABEL, "list"):
        task, chosen = "multi_label", several
    elif not named and len(switches) > 2:
        task, chosen = "multi_label", switches
    elif measured := _fractional(table, called((*LABEL, *SCORE), "number")):
        task, chosen = "regression", measured
    used = [chosen] if isinstance(chosen, str) else chosen or []
    text = _text_columns([column for column in columns if column.name not in used])
    if chosen and text:
        return task, {"text": text, "label": chosen}
    judged_by = {*LABEL, *SCORE, *CLASS} & {_bare(column.name) for column in columns}
    if (alone := called(TEXT[:1], "text")) and not judged_by:
        return "causal_lm", {"completion": alone}
    seen = ", ".join(f"{column.name} ({column.kind})" for column in columns)
    raise DataError(
        "the columns are neither text and label or score, nor prompt and completion, nor messages, "
        "nor chosen and rejected: "
        f"{seen}; rename columns so, or write the configuration by hand, with their names in [data]"
    )


def guess_clients(table: pa.Table, used: Collection[str]) -> list[Column]:
    """Columns whose values may say whose row each is, the likeliest first; not those of ``used``.

    First those that ``names_client`` finds, then other texts of few values. Each has a value in
    every row, and of each value ``LEAST_ROWS`` rows on average.
    """
    found = [
        column
        for column in describe(table)
        if column.name not in used
        and _bare(column.name) not in SPLIT
        and 2 <= column.distinct <= min(MOST_CLIENTS, table.num_rows // LEAST_ROWS)
        and column.kind in ("text", "category", "number")
        and _is_filled(decoded(table[column.name]))
    ]
    named = [column for column in found if names_client(column.name)]
    others = [column for column in found if column.kind == "category" and column not in named]
    return named + [c for c in others if is_text(as_numbers(decoded(table[c.name])).type)]


def is_own_value(table: pa.Table, name: str) -> bool:
    """Whether a column's name is also one of its values, as in a file without a header row."""
    values = decoded(table[name])
    return is_text(values.type) and pc.any(pc.equal(values, name)).as_py() is True


def names_client(name: str) -> bool:
    """Whether the last word of a column's name, before "id" or the like, is one of ``CLIENT``.

    So "patient_id" names a client, and "patient_age" does not.
    """
    words = [word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    last = next((word for word in reversed(words) if word not in KEYS), "")
    return CLIENT.fullmatch(last) is not None


def _is_filled(values: pa.ChunkedArray) -> bool:
    if values.null_count or not (is_text(values.type) or is_number(values.type)):
        return False
    return not pc.any(pc.equal(pc.utf8_trim_whitespace(values.cast(pa.string())), "")).as_py()


def _fractional(table: pa.Table, name: str | None) -> str | None:
    """``name`` if a number in this column is not whole."""
    if name is None:
        return None
    return None if _is_whole(as_numbers(decoded(table[name]).drop_null())) else name


def _is_whole(values: pa.ChunkedArray) -> bool:
    """Whether no number in it has a fraction; NaN is none."""
    if not pa.types.is_floating(values.type):
        return True
    return (
        pc.all(pc.or_(pc.is_nan(values), pc.equal(values, pc.round(values)))).as_py() is not False
    )


def _is_switch(table: pa.Table, name: str) -> bool:
    """Whether a column holds 0 or 1, or false or true, in whatever form."""
    values = decoded(table[name]).drop_null().unique().to_pylist()
    return {str(value).lower() for value in values} <= SWITCH.keys()


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
