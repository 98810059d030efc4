"""Texts of which only some parts are trained on: completions, and the assistant's turns of a chat.

The whole text is tokenised at once, and its tokens are matched to the parts by character offsets,
so that a token across the border of prompt and completion is the one that any text would have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rolora.data import tables
from rolora.data.examples import Examples, flatten, offsets_of
from rolora.errors import ConfigError, DataError


@dataclass(frozen=True)
class Marked:
    """A text and its parts that are trained on: (start, end) in characters, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


def joined(prompt: str, completion: str) -> Marked:
    """The prompt with its completion behind it, trained on the completion."""
    text = prompt + completion
    return Marked(text, ((len(prompt), len(text)),))


def chats(tokenizer: Any, table: Any, column: str, source: str) -> list[Marked]:
    """A column of chats as the tokenizer's own template writes them, trained on assistant turns.

    A chat is a list of {"role", "content"}. A turn is what the template adds between "assistant,
    your turn" and the turn's end, end mark included. Raises DataError naming the first row that is
    not such a chat, or whose earlier turns the template writes differently once later ones follow.
    """
    tables.require_columns(table, [column], source)
    return [
        _chat(tokenizer, _turns(value, place), place)
        for value, place in zip(tables.cells(table, column), places(source), strict=False)
    ]


def places(source: str) -> Iterable[str]:
    """What the rows of a source are called in messages: they count from 1."""
    return (f"{source}, row {row}" for row in itertools.count(1))


def _turns(value: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{place}: messages must be a list of {{'role', 'content'}} entries")
    for number, turn in enumerate(value, start=1):
        for key in ("role", "content"):
            if not isinstance(turn.get(key), str):
                raise DataError(f"{place}: message {number} has no text under {key!r}")
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in value):
        raise DataError(f"{place}: no message with role 'assistant' has any text to learn")
    if value[0]["role"] == "assistant":
        raise DataError(
            f"{place}: the first message is the assistant's: put the system's or user's before it"
        )
    return value


def _chat(tokenizer: Any, turns: list[dict[str, Any]], place: str) -> Marked:
    text = _render(tokenizer, turns, place)
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:number], place, asking=True)
        after = _render(tokenizer, turns[: number + 1], place)
        if not (after.startswith(before) and text.startswith(after)):
            raise DataError(
                f"{place}: the chat template writes message {number + 1} differently depending on "
                "what follows it: use prompt and completion columns"
            )
        spans.append((len(before), len(after)))
    return Marked(text, tuple(spans))


def _render(tokenizer: Any, turns: Sequence[Any], place: str, asking: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=asking
        )
    except Exception as error:  # a template is a program of the model's author: it raises anything
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{place}: the chat template refuses these messages: {first}") from error
    return text


def require_offsets(tokenizer: Any) -> None:
    """Raise ConfigError for a tokenizer without character offsets."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which gives no character offsets: "
            "use a model with a tokenizer.json"
        )


def encode_marked(
    tokenizer: Any,
    rows: Sequence[Marked],
    named: Iterable[str],
    max_length: int,
    *,
    special: bool,
    end: bool,
) -> Examples:
    """Tokenise ``rows``; ``targets`` is 1 for each token that reaches into a span.

    ``special`` adds the tokenizer's special tokens (a chat template has written its own), ``end``
    one end-of-text token, trained on. Rows too long keep their last ``max_length`` tokens. A row's
    first token is never predicted. ``named`` is what messages call the rows. Raises DataError for a
    row without a target.
    """
    encoded = tokenizer(
        [row.text for row in rows],
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    tokens: list[list[int]] = []
    targets: list[list[int]] = []
    truncated = 0
    for row, ids, offsets, place in zip(
        rows, encoded["input_ids"], encoded["offset_mapping"], named, strict=False
    ):
        wanted = [int(any(a < stop and b > start for start, stop in row.spans)) for a, b in offsets]
        if end and tokenizer.eos_token_id is not None:
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids, wanted = [*ids, tokenizer.eos_token_id], [*wanted, 1]
            wanted[-1] = 1
        truncated += len(ids) > max_length
        ids, wanted = ids[-max_length:], [0, *wanted[-max_length:][1:]]
        if not any(wanted):
            raise DataError(f"{place}: there is no token to learn after the row's first one")
        tokens.append(ids)
        targets.append(wanted)
    return Examples(
        tokens=flatten(tokens, torch.int32),
        offsets=offsets_of(tokens),
        targets=flatten(targets, torch.uint8),
        truncated=truncated,
    )


def last_span(examples: Examples, row: int) -> tuple[list[int], list[int]]:
    """A row's tokens before its last run of trained tokens, and that run."""
    pairs = _pairs(examples, row)
    while not pairs[-1][1]:
        pairs.pop()
    span: list[int] = []
    while pairs[-1][1]:  # a row's first token is never trained on
        span.append(pairs.pop()[0])
    return [token for token, _ in pairs], span[::-1]


def masks(examples: Examples, tokenizer: Any) -> list[list[tuple[str, bool]]]:
    """Each row's text in runs of tokens, and whether a run is trained on."""
    shown = []
    for row in range(len(examples)):
        runs = itertools.groupby(_pairs(examples, row), key=lambda pair: pair[1])
        shown.append([(tokenizer.decode([t for t, _ in run]), on) for on, run in runs])
    return shown


def _pairs(examples: Examples, row: int) -> list[tuple[int, bool]]:
    """A row's tokens, and whether each is trained on."""
    part = slice(*examples.offsets[row : row + 2].tolist())
    targets = examples.targets[part].bool().tolist()
    return list(zip(examples.tokens[part].tolist(), targets, strict=True))
