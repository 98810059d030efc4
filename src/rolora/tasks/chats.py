"""Chats as the model's own template writes them, and the parts of them that are trained on.

A template may write the last turn differently from earlier ones: once more turns follow, Qwen3
drops its reasoning, gpt-oss and Phi-3 change its end mark. Such a turn is trained on in a separate
row that ends with it, so that the model learns it in the form, and after the history, that it will
see.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

from transformers.utils import chat_template_utils

from rolora.data import tables
from rolora.errors import ConfigError, DataError, nearest
from rolora.tasks.spans import Marked, places

# who speaks in ShareGPT's "from", as a role
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
ANSWER = "\ue000"  # a private-use character, which no template and no chat contains


@dataclass(frozen=True)
class Chat:
    """A row: its turns and tools as a template takes them, the numbers of the turns to learn (from
    0), and what messages call it."""

    turns: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    learnt: Sequence[int]
    place: str


@dataclass(frozen=True)
class Template:
    """The chat template of ``tokenizer``, to which it is always ``date`` (None: today)."""

    tokenizer: Any
    date: datetime.date | None

    def write(self, chat: Chat, *, asking: bool = False) -> str:
        """The chat as text; ``asking`` adds what tells the assistant that it is its turn.

        OpenAI's rows hold the arguments of a tool call as JSON text. Most templates write an object
        as JSON, and would write text as JSON once more: they are given the object. Those that
        fail on it are given the text.
        """
        parsed = [_with_objects(turn) for turn in chat.turns]
        try:
            return self._written(parsed, chat, asking)
        except DataError:
            if parsed == list(chat.turns):
                raise
            return self._written(list(chat.turns), chat, asking)

    def _written(self, turns: Sequence[Mapping[str, Any]], chat: Chat, asking: bool) -> str:
        tools = None if chat.tools is None else list(chat.tools)
        try:
            with _on(self.date):
                text: str = self.tokenizer.apply_chat_template(
                    turns, tools, tokenize=False, add_generation_prompt=asking
                )
        except Exception as error:  # a template is its author's program: it raises anything
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(
                f"{chat.place}: the chat template refuses these messages: {first}"
            ) from error
        return text

    def marked(self, chat: Chat) -> list[Marked]:
        """The chat as rows, in order of the last turn that each is trained on.

        One row has every turn that the whole text leaves as it is; each other turn has a row that
        ends with it. DataError for a turn whose beginning cannot be told.
        """
        whole = self.write(chat)
        alone: dict[int, Marked] = {}
        together: list[tuple[int, int]] = []
        last = 0
        for number in chat.learnt:
            start, text = self._turn(chat, number)
            span = (start, len(text))
            if whole.startswith(text):
                together, last = [*together, span], number
            else:
                alone[number] = Marked(text, (span,))
        if together:
            alone[last] = Marked(whole, tuple(together))
        return [alone[number] for number in sorted(alone)]

    def _turn(self, chat: Chat, number: int) -> tuple[int, str]:
        """The chat up to the end of a turn, and where in it that turn's answer begins."""
        before, turn = chat.turns[:number], chat.turns[number]
        text = self.write(replace(chat, turns=[*before, turn]))
        prompt = self.write(replace(chat, turns=before), asking=True)
        if text.startswith(prompt):
            return len(prompt), text
        # some ask for reasoning and then leave it out of the turn (DeepSeek-R1)
        some = {"role": turn["role"], "content": ANSWER}
        head, found, _ = self.write(replace(chat, turns=[*before, some])).partition(ANSWER)
        if not (found and text.startswith(head) and prompt.startswith(head)):
            raise DataError(
                f"{chat.place}: the chat template writes what precedes message {number + 1} "
                "differently depending on that message: use prompt and completion columns"
            )
        return len(head), text


def read_chats(table: Any, messages: str, tools: str | None, source: str) -> list[Chat]:
    """The rows of a table as chats.

    A turn is {"role", "content"}, or ShareGPT's {"from", "value"}. Its content is a text, a list of
    {"type": "text", "text"} parts, which are joined, or missing beside tool calls; an assistant's
    turn of ``weight`` 0 is not learnt. Tools are a list of JSON schemas, or JSON text of one.
    Raises DataError naming the first row that is not such a chat.
    """
    tables.require_columns(table, [messages, *([tools] if tools else [])], source)
    chats = tables.cells(table, messages)
    offered = tables.cells(table, tools) if tools else [None] * len(chats)
    return [
        _chat(turns, given, place)
        for turns, given, place in zip(chats, offered, places(source), strict=False)
    ]


def require_template(tokenizer: Any, column: str) -> None:
    """Raise ConfigError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the model's tokenizer has no chat template, so the chats in {column!r} cannot be "
            "written out: use data.prompt and data.completion, or the like, with columns of texts"
        )


def is_chat(table: Any, column: str) -> bool:
    """Whether a column, which has to be there, holds chats rather than texts."""
    return any(isinstance(cell, list) for cell in tables.cells(table, column))


def continued(first: Sequence[Chat], then: Sequence[Chat]) -> list[Chat]:
    """Each chat of ``first`` with the turns of ``then`` behind it, of which alone is learnt."""
    return [
        replace(
            start,
            turns=[*start.turns, *end.turns],
            learnt=[len(start.turns) + number for number in end.learnt],
        )
        for start, end in zip(first, then, strict=True)
    ]


def require_answers(chats: Sequence[Chat]) -> None:
    """Raise DataError for a chat of which nothing can be learnt."""
    for chat in chats:
        if not any(says_something(chat.turns[number]) for number in chat.learnt):
            raise DataError(f"{chat.place}: no message with role 'assistant' has any text to learn")
        if 0 in chat.learnt:
            raise DataError(
                f"{chat.place}: the first message is the assistant's: put the system's or user's "
                "before it, or give it weight 0"
            )


def question(chat: Chat) -> Chat:
    """The chat without the answer that it may end with."""
    answered = chat.turns[-1]["role"] == "assistant"
    return replace(chat, turns=chat.turns[:-1]) if answered else chat


def _chat(value: Any, tools: Any, place: str) -> Chat:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{place}: messages must be a list of {{'role', 'content'}} entries")
    if not value:
        raise DataError(f"{place}: there are no messages")
    turns, learnt = [], []
    for number, given in enumerate(value):
        turn = _turn(given, f"{place}: message {number + 1}")
        weight = turn.pop("weight", 1)
        if weight not in (0, 1):
            raise DataError(f"{place}: message {number + 1} has weight {weight!r}: use 0 or 1")
        if turn["role"] == "assistant" and weight:
            learnt.append(number)
        turns.append(turn)
    return Chat(turns, _tools(tools, place), learnt, place)


def _turn(given: Mapping[str, Any], what: str) -> dict[str, Any]:
    # as transformers does: a template takes a key that is there as given
    turn = {key: value for key, value in given.items() if value is not None}
    if "role" not in turn and "from" in turn:
        speaker = turn.pop("from")
        if speaker not in SPEAKERS:
            raise DataError(f"{what} is from {speaker!r}: {nearest(str(speaker), SPEAKERS)}")
        said = {"content": turn.pop("value")} if "value" in turn else {}
        turn = {"role": SPEAKERS[speaker], **said, **turn}
    if isinstance(turn.get("content"), list):
        turn["content"] = "".join(_text(part, what) for part in turn["content"])
    silent = "content" not in turn and bool(turn.get("tool_calls"))
    for key in ("role",) if silent else ("role", "content"):
        if not isinstance(turn.get(key), str):
            raise DataError(f"{what} has no text under {key!r}")
    return turn


def _with_objects(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """The turn with the arguments of its tool calls as objects, where they are JSON text of one."""
    calls = turn.get("tool_calls")
    return {**turn, "tool_calls": list(map(_parsed, calls))} if isinstance(calls, list) else turn


def _parsed(call: Any) -> Any:
    function: Any = call.get("function") if isinstance(call, dict) else None
    text = function.get("arguments") if isinstance(function, dict) else None
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    return (
        {**call, "function": {**function, "arguments": found}} if isinstance(found, dict) else call
    )


def _text(part: Any, what: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise DataError(f"{what} has a part {kind!r}, but only parts of type 'text' can be trained on")


def _tools(given: Any, place: str) -> list[dict[str, Any]] | None:
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except ValueError as error:
            raise DataError(f"{place}: its tools are not valid JSON: {error}") from None
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise DataError(f"{place}: tools must be a list of JSON schemas")
    return given


def says_something(turn: Mapping[str, Any]) -> bool:
    """Whether a turn has any text or calls a tool."""
    return bool(turn.get("content", "").strip() or turn.get("tool_calls"))


@contextlib.contextmanager
def _on(date: datetime.date | None) -> Iterator[None]:
    """Let chat templates find this date, at midnight, when they ask for the time."""
    if date is None:
        yield
        return
    then = datetime.datetime.combine(date, datetime.time())
    # a template can be given values, but no function, in place of transformers' own strftime_now
    with mock.patch.object(chat_template_utils, "datetime", SimpleNamespace(now=lambda: then)):
        yield
