"""Causal language modelling: learn completions of prompts, or the assistant's turns of chats."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from functools import reduce
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rolora.data import tables
from rolora.data.examples import Batch, Examples, grouped
from rolora.errors import ConfigError, DataError
from rolora.model.base import Base
from rolora.tasks.chats import (
    Chat,
    Template,
    continued,
    is_chat,
    question,
    read_chats,
    require_answers,
    require_template,
)
from rolora.tasks.generation import generate
from rolora.tasks.registry import Task
from rolora.tasks.spans import encode_marked, joined, places, prompts, require_offsets

CHUNK_LOGITS = 1 << 24  # logits held at a time: 64 MiB of float32


def causal_lm(
    base: Base,
    *,
    prompt: str | Sequence[str] | None = None,
    completion: str | None = None,
    separator: str | None = None,
    messages: str | None = None,
    tools: str | None = None,
    date: datetime.date | None = None,
    max_length: int,
) -> Task:
    """The task of writing a completion, given by columns, or the assistant's turns of a chat.

    Give ``completion`` (behind the text of ``prompt``'s columns, if any; an end-of-text token
    follows it; for ``separator`` see ``tables.prompts``), or ``messages``, a column of chats (see
    ``read_chats``) written out by the tokenizer's chat template, which is given the column
    ``tools`` and ``date`` as today's. ``prompt`` and ``completion`` may hold chats, too; only turns
    of the completion are learned then.
    Metrics: perplexity and loss (nats per token), over trained tokens only. Raises ConfigError
    where the tokenizer lacks offsets or a chat template, or the model's logits are not its output
    embedding's.
    """
    require_offsets(base.tokenizer)
    if not base.outline:
        require_plain_logits(base.model)
    if messages is not None:
        require_template(base.tokenizer, messages)

    def read(table: Any, source: str, *columns: str | Sequence[str] | None) -> list[Chat] | None:
        """The chats in ``messages``, or in these columns one behind the other; None: texts."""
        names = [messages] if messages is not None else [name for name in columns if name]
        named = [name for name in names if isinstance(name, str)]
        tables.require_columns(table, named, source)
        if messages is None and not any(is_chat(table, name) for name in named):
            return None
        require_template(base.tokenizer, named[0])
        if len(named) < len(names):
            raise ConfigError("data.prompt names two columns, but these rows are chats: name one")
        return reduce(continued, [read_chats(table, name, tools, source) for name in named])

    def encode(table: Any, source: str) -> Examples:
        chats = read(table, source, prompt, completion)
        if chats is not None:
            require_answers(chats)
            template = Template(base.tokenizer, date)
            rows = [template.marked(chat) for chat in chats]
        else:
            ends = tables.texts(table, str(completion), source)
            for text, place in zip(ends, places(source), strict=False):
                if not text.strip():
                    raise DataError(f"{place}: {completion!r} is empty: there is nothing to learn")
            starts = [""] * len(ends)
            if prompt:
                starts = tables.prompts(table, prompt, separator, source)
            rows = [[joined(*pair)] for pair in zip(starts, ends, strict=True)]
        limit, plain = base.limit(max_length).tokens, chats is None
        sizes = [len(parts) for parts in rows]
        named = chain.from_iterable(map(repeat, places(source), sizes))
        every = [part for parts in rows for part in parts]
        found = encode_marked(base.tokenizer, every, named, limit, special=plain, end=plain)
        return found if max(sizes) == 1 else grouped(found, sizes)

    def predict(table: Any, source: str, _: Any, most: int) -> list[dict[str, Any]]:
        if not (prompt or messages):
            raise ConfigError("a text without data.prompt has nothing to continue")
        chats = read(table, source, prompt)
        if chats is not None:
            template = Template(base.tokenizer, date)
            starts = [template.write(question(chat), asking=True) for chat in chats]
        else:
            starts = tables.prompts(table, prompt or [], separator, source)
        asked = prompts(base.tokenizer, starts, special=chats is None)
        for ids, place in zip(asked, places(source), strict=False):
            if not ids:
                raise DataError(f"{place}: {prompt!r} is empty: there is nothing to continue")
        return [{"completion": text} for text in generate(base, asked, most)]

    return Task(
        encode=encode,
        encode_test=encode,
        loss=loss,
        outputs=outputs,
        score=score,
        predict=predict,
    )


def require_plain_logits(model: Any) -> None:
    """Raise ConfigError unless the logits are the output embedding of the last hidden state.

    Scaled or capped logits (Gemma 2, Cohere, Granite) would need their own loss. Runs four tokens.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ConfigError(
            f"{name} has no plain output embedding, which causal_lm needs: use another model"
        )
    inputs = {"input_ids": torch.arange(4, device=head.weight.device).unsqueeze(0)}
    with torch.no_grad():
        given = model(**inputs).logits.double()
        hidden = model.base_model(**inputs).last_hidden_state
        plain = functional.linear(hidden, head.weight, head.bias).double()
    same = given.shape == plain.shape and (given - plain).abs().max() <= 1e-5 * plain.abs().max()
    # a cap bends logits as small as an untrained model's by less than rounding
    capped = getattr(model.config, "final_logit_softcapping", None) is not None
    if capped or not same:
        raise ConfigError(
            f"{name} scales or caps its logits after the output embedding, which is not supported: "
            "use another model"
        )


class TokenLoss(torch.autograd.Function):
    """-log softmax(weight · hidden + bias)[target] per token, a chunk of tokens at a time.

    The gradient with respect to ``hidden``, (softmax − onehot) · weight, is formed in the forward
    pass while a chunk's logits are there, so no logits are kept. The output embedding is frozen.
    Logits of half-precision models are raised to float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
    ) -> Tensor:
        """``hidden`` (tokens, width), ``weight`` (vocabulary, width), ``target`` (tokens,)."""
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = torch.float32 if hidden.dtype.itemsize < 4 else hidden.dtype
        losses = torch.empty(len(target), dtype=wide, device=hidden.device)
        size = max(CHUNK_LOGITS // len(weight), 1)
        for first in range(0, len(target), size):
            part = slice(first, first + size)
            logits = functional.linear(hidden[part], weight, bias).to(wide)
            index = target[part].unsqueeze(1)
            total = logits.logsumexp(dim=1, keepdim=True)
            losses[part] = (total - logits.gather(1, index)).squeeze(1)
            if gradient is not None:
                excess = logits.sub_(total).exp_()
                excess.scatter_add_(1, index, torch.full_like(total, -1.0))
                gradient[part] = excess.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0].unsqueeze(1)).to(gradient.dtype), None, None, None


def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per row, the negative log-likelihood summed over its trained tokens, and their number."""
    places, ids = batch.targets, batch.inputs["input_ids"]
    states = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    hidden = states.flatten(0, 1).index_select(0, places - 1)  # no row's first token is predicted
    head = model.get_output_embeddings()
    target = ids.flatten().index_select(0, places)
    each: Tensor = TokenLoss.apply(hidden, head.weight, head.bias, target)  # type: ignore[no-untyped-call]
    empty = each.new_zeros(ids.numel())
    summed = empty.index_copy(0, places, each).view(ids.shape).sum(dim=1)
    return summed, empty.index_fill(0, places, 1).view(ids.shape).sum(dim=1)


def outputs(model: Any, batch: Batch) -> Tensor:
    """(rows, 2) float32: ``loss``'s sum and number of tokens."""
    return torch.stack(loss(model, batch), dim=1).float()


def score(outputs: Tensor, examples: Examples) -> dict[str, float]:
    """Mean loss per trained token over all rows, and its exponential; infinite on overflow."""
    total, count = outputs.double().sum(dim=0)
    mean = total / count
    return {
        "loss": float(mean) if mean.isfinite() else math.inf,
        "perplexity": float(mean.exp()) if mean.isfinite() else math.inf,
    }
