"""Greedy generation through the bank, and the metrics of generated completions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import transformers

from rolora.data.examples import Examples
from rolora.errors import ConfigError, DataError
from rolora.model.base import Base
from rolora.model.checkpoint import quiet
from rolora.tasks.spans import last_span

ANSWER_TOKENS = 32  # as LLM-Adapters lets a model write before it looks for an answer


def answer_metrics(
    base: Base, examples: Examples, count: int, pattern: str | None = None
) -> dict[str, float]:
    """``exact_match`` of answers generated for the table's first ``count`` rows; with ``pattern``,
    a regular expression, ``answer_accuracy`` instead. The bank holds the client that answers.

    A row's right answer is its last completion. An exact match is word for word; for it no more
    tokens are written than the longest completion has.
    """
    groups = torch.arange(len(examples)) if examples.groups is None else examples.groups
    lasts = groups.bincount().cumsum(0) - 1
    asked = [last_span(examples, row) for row in lasts[:count].tolist()]
    longest = max(len(completion) for _, completion in asked)
    most = longest if pattern is None else ANSWER_TOKENS
    written = generate(base, [prompt for prompt, _ in asked], most)
    right = [base.tokenizer.decode(tokens, skip_special_tokens=True) for _, tokens in asked]
    answers = list(zip(written, right, strict=True))
    if pattern is None:
        same = sum(text.split() == right.split() for text, right in answers)
        return {"exact_match": same / len(answers)}
    return {"answer_accuracy": answer_accuracy(answers, pattern)}


def generate(
    base: Base,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """The greedy continuation of each prompt (token ids), up to an end-of-text token.

    The bank holds one client, or none for the plain base. A prompt keeps the last tokens that leave
    the model room for ``max_new_tokens``; ConfigError if there is none. ``show``, for one prompt,
    gets the text piece by piece.
    """
    pad = base.tokenizer.pad_token_id
    room = base.limit(1 << 30).tokens - max_new_tokens
    if room < 1:
        raise ConfigError(f"the model has no room for {max_new_tokens} new tokens after a prompt")
    # set here, since what is left unset comes from the checkpoint's own generation settings
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=_end_tokens(base),
    )
    streamer = None
    if show is not None:
        streamer = transformers.TextStreamer(base.tokenizer, True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: show(text)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        rows = [prompts[i][-room:] for i in places]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode(), quiet():
            answers = base.model.generate(  # type: ignore[operator]
                input_ids=ids.to(base.device),
                attention_mask=mask.to(base.device),
                generation_config=settings,
                streamer=streamer,
            )
        for place, answer in zip(places, answers[:, width:], strict=True):
            texts[place] = base.tokenizer.decode(answer, skip_special_tokens=True)
    return texts


def _end_tokens(base: Base) -> list[int] | None:
    """Every token that ends a text: the tokenizer's, and what the checkpoint generates up to."""
    stated = base.model.generation_config.eos_token_id  # type: ignore[union-attr]
    stated = stated if isinstance(stated, list) else [stated]
    return sorted({*stated, base.tokenizer.eos_token_id} - {None}) or None


def answer_accuracy(answers: Sequence[tuple[str, str]], pattern: str) -> float:
    """The share of answers in which ``pattern`` first finds what it first finds in the right one.

    As LLM-Adapters (arXiv 2304.01933) measures commonsense questions. Raises DataError for a right
    answer in which it finds nothing.
    """
    hits = 0
    for text, right in answers:
        expected = re.search(pattern, right)
        if expected is None:
            raise DataError(f"eval.answer = {pattern!r} finds nothing in the completion {right!r}")
        found = re.search(pattern, text)
        hits += found is not None and found[0] == expected[0]
    return hits / len(answers)
