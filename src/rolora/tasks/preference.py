"""Preferences: make one completion of a prompt likelier than another, or wanted completions
likelier than unwanted ones, relative to the model before any training.

A row is two token sequences: the chosen and the rejected completion of its prompt; or, for KTO, its
completion and that of the client's row before it, which estimates how far the model has moved as a
whole.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, repeat, takewhile
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rolora.data import tables
from rolora.data.examples import Batch, Examples, moved
from rolora.errors import ConfigError, DataError
from rolora.model.base import Base
from rolora.tasks.causal_lm import loss as completion_loss
from rolora.tasks.causal_lm import require_plain_logits
from rolora.tasks.chats import (
    Chat,
    Template,
    is_chat,
    read_chats,
    require_template,
    says_something,
)
from rolora.tasks.registry import Task, neighbour
from rolora.tasks.spans import Marked, encode_marked, joined, places, require_offsets

Loss = Literal["dpo", "ipo", "kto"]


def preference(
    base: Base,
    *,
    chosen: str | None = None,
    rejected: str | None = None,
    completion: str | None = None,
    label: str | None = None,
    prompt: str | Sequence[str] | None = None,
    separator: str | None = None,
    date: datetime.date | None = None,
    loss: Loss,
    beta: float,
    label_smoothing: float,
    max_length: int,
) -> Task:
    """The task of preferring ``chosen`` to ``rejected``, or of judging ``completion`` by ``label``.

    The columns hold texts (behind that of ``prompt``; an end-of-text token follows them), or chats
    (behind that of ``prompt``), which end with one answer and are written out by the tokenizer's
    chat template. Without ``prompt`` it is the common beginning of chosen and rejected. For
    the losses see ``losses``. Metrics: ``accuracy``, how often a row's gap (see ``gaps``) is above
    0, where 0 counts half; ``margin``, beta times the mean gap; and ``loss``.
    """
    require_offsets(base.tokenizer)
    if not base.outline:
        require_plain_logits(base.model)
    limit = base.limit(max_length).tokens
    names = [name for name in (chosen, rejected, completion) if name is not None]

    def completions(table: Any, source: str) -> Examples:
        tables.require_columns(table, names, source)
        plain = not is_chat(table, names[0])
        if not plain:
            require_template(base.tokenizer, names[0])

        def read(names: Sequence[str]) -> tuple[Sequence[Any], Sequence[Sequence[Any]]]:
            if plain:
                return _texts(table, prompt, names, separator, source)
            return _chats(table, prompt, names, source)

        starts, ends = read(names)
        if completion is not None and neighbour(completion) in table.column_names:
            ends = [*ends, *read([neighbour(completion)])[1]]
        elif completion is not None:
            ends = [*ends, [*ends[0][-1:], *ends[0][:-1]]]

        def marked(start: Any, end: Any, place: str) -> Marked:
            return joined(start, end) if plain else _answered(base, date, start, end, place)

        rows = zip(starts, *ends, places(source), strict=False)
        sequences = [marked(start, end, place) for start, *both, place in rows for end in both]
        named = chain.from_iterable(map(repeat, places(source), repeat(2)))
        found = encode_marked(base.tokenizer, sequences, named, limit, special=plain, end=plain)
        borders = found.offsets[::2].clone(), found.offsets[1::2].clone()
        return replace(found, offsets=borders[0], seconds=borders[1])

    def encode(table: Any, source: str) -> Examples:
        found = completions(table, source)
        if label is None:
            return found
        wanted = tables.switches(table, label, source)
        return replace(found, answers=torch.tensor(wanted, dtype=torch.int64))

    def train_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.reference is None:
            raise ValueError("a preference is learned from examples with their reference")
        ratio, count = ratios(model, batch)
        each = losses(ratio, count, batch.answers, batch.sizes, loss, beta, label_smoothing)
        return each, torch.ones_like(each, dtype=torch.int64)

    def score(outputs: Tensor, examples: Examples) -> dict[str, float]:
        if examples.reference is None:
            raise ValueError("a preference is scored on examples with their reference")
        ratio, count = torch.split(outputs.double(), 2, dim=1)
        each = losses(ratio, count, examples.answers, (), loss, beta, label_smoothing)
        gap = gaps(ratio, examples.answers, ())
        right = (gap > 0).double() + (gap == 0).double() / 2
        return {
            "accuracy": float(right.mean()),
            "margin": beta * float(gap.mean()),
            "loss": float(each.mean()),
        }

    def predict(table: Any, source: str, run: Any, _: int) -> list[dict[str, Any]]:
        rewards = (beta * run(completions(table, source))[:, :2].double()).tolist()
        if completion is not None:
            return [{"reward": reward} for reward, _ in rewards]
        return [
            {"chosen_reward": one, "rejected_reward": other, "margin": one - other}
            for one, other in rewards
        ]

    return Task(
        encode=encode,
        encode_test=encode,
        loss=train_loss,
        outputs=outputs,
        score=score,
        predict=predict,
    )


def ratios(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """log π(y|x) − log π_ref(y|x) of each row's two completions, and their tokens: both (rows, 2).

    Without ``batch.reference``: log π(y|x), of which the reference is made.
    """
    summed, count = completion_loss(model, batch)
    found = -summed.view(-1, 2)
    if batch.reference is not None:
        found = found - batch.reference[:, :2]
    return found, count.view(-1, 2)


def outputs(model: Any, batch: Batch) -> Tensor:
    """(rows, 4) float32: both of ``ratios``."""
    return torch.cat(ratios(model, batch), dim=1).float()


def gaps(ratio: Tensor, answers: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """What training is to raise, (rows,): the chosen's log-ratio less the rejected's.

    With ``answers``: a wanted completion's log-ratio less z, or z less an unwanted one's. z, which
    gets no gradient, is the mean of the second log-ratios over the client's rows, but at least 0
    (KTO, arXiv:2402.01306, section 4.1). ``sizes``: rows of each client; empty for one client.
    """
    first, second = ratio.unbind(dim=1)
    if answers is None:
        return first - second
    sizes = sizes or (len(first),)
    each = moved(torch.tensor(sizes), first.device)
    client = torch.arange(len(sizes), device=first.device)
    client = client.repeat_interleave(each, output_size=len(first))
    summed = first.new_zeros(len(sizes)).index_add(0, client, second.detach())
    z = (summed / each).clamp(min=0)[client]
    return torch.where(answers == 1, first - z, z - first)


def losses(
    ratio: Tensor,
    count: Tensor,
    answers: Tensor | None,
    sizes: Sequence[int],
    loss: Loss,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """The loss of each row, (rows,), from its ``ratios``.

    dpo: −log σ(β gap), mixed with that of the pair the wrong way round by ``label_smoothing``
    (arXiv:2305.18290, equation 7; its smoothing is cDPO's). ipo: (gap − 1/2β)², of log-ratios per
    token, as in TRL (arXiv:2310.12036, equation 17). kto: 1 − σ(β gap), both kinds of rows weighing
    the same.
    """
    if loss == "ipo":
        return (gaps(ratio / count, answers, sizes) - 1 / (2 * beta)).square()
    gap = beta * gaps(ratio, answers, sizes)
    if loss == "kto":
        return torch.sigmoid(-gap)
    return -(1 - label_smoothing) * logsigmoid(gap) - label_smoothing * logsigmoid(-gap)


def _texts(
    table: Any,
    prompt: str | Sequence[str] | None,
    names: Sequence[str],
    separator: str | None,
    source: str,
) -> tuple[list[str], list[list[str]]]:
    """Each row's prompt, and its completion of each of these columns."""
    ends = [tables.texts(table, name, source) for name in names]
    for row, place in zip(zip(*ends, strict=True), places(source), strict=False):
        for text, name in zip(row, names, strict=True):
            if not text.strip():
                raise DataError(f"{place}: {name!r} is empty")
        _require_two(row, names, place)
    if prompt is not None:
        return tables.prompts(table, prompt, separator, source), ends
    starts = [row[0][: _alike(*row)] for row in zip(*ends, strict=True)]
    return starts, [[t[len(s) :] for t, s in zip(end, starts, strict=True)] for end in ends]


def _chats(
    table: Any, prompt: str | Sequence[str] | None, names: Sequence[str], source: str
) -> tuple[list[list[Any]], list[list[Any]]]:
    """Each row's turns before the answer, and the answer, a turn, of each of these columns."""
    if prompt is not None and not isinstance(prompt, str):
        raise ConfigError("data.prompt names two columns, but the completions are chats: name one")
    read = [*([prompt] if prompt else []), *names]
    for name in read:
        for cell, place in zip(tables.cells(table, name), places(source), strict=False):
            if not isinstance(cell, list):
                raise DataError(
                    f"{place}: {name!r} is not a list of messages, but {names[0]!r} holds lists: "
                    "give all as texts, or all as messages; a prompt that the chats begin with is "
                    "left out of [data]"
                )
    columns = [read_chats(table, name, None, source) for name in read]
    before = columns.pop(0) if prompt else [Chat((), None, (), "")] * table.num_rows
    starts, ends = list[list[Any]](), [list[Any]() for _ in names]
    for first, *row in zip(before, *columns, strict=True):
        whole, place = [[*first.turns, *chat.turns] for chat in row], row[0].place
        _require_two(whole, names, place)
        shared = len(first.turns) if len(row) == 1 else _alike(*whole)
        for name, turns, end in zip(names, whole, ends, strict=True):
            roles = [turn["role"] for turn in turns[shared:]]
            if roles != ["assistant"] or not shared:
                raise DataError(
                    f"{place}: {name!r} must end with one message of the assistant behind those of "
                    f"the prompt; behind {shared} of the prompt are {roles}"
                )
            if not says_something(turns[-1]):
                raise DataError(f"{place}: the answer in {name!r} is empty")
            end.append(turns[-1])
        starts.append(whole[0][:shared])
    return starts, ends


def _alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The number of equal items at the beginning of both."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _require_two(row: Sequence[Any], names: Sequence[str], place: str) -> None:
    if len(row) > 1 and row[0] == row[1]:
        raise DataError(f"{place}: {names[0]!r} and {names[1]!r} are the same: remove the row")


def _answered(
    base: Base, date: datetime.date | None, start: Sequence[Any], answer: Any, place: str
) -> Marked:
    """A chat as the template writes it, trained on its answer."""
    chat = Chat([*start, answer], None, [len(start)], place)
    (found,) = Template(base.tokenizer, date).marked(chat)
    return found
