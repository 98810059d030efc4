"""Multiple choice: a prompt, a list of choices, and which of them is right.

Training teaches the right choice as a completion of the prompt, one row per question. A test asks
which choice the model finds likeliest, so there each question becomes one row per choice.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from rolora.data import tables
from rolora.data.columns import is_lettered
from rolora.data.examples import Examples, grouped
from rolora.errors import DataError
from rolora.model.base import Base
from rolora.tasks.causal_lm import loss, outputs, require_plain_logits
from rolora.tasks.causal_lm import score as score_completions
from rolora.tasks.registry import Task
from rolora.tasks.spans import Marked, encode_marked, joined, places, require_offsets


@dataclass(frozen=True)
class Question:
    """One row of the table; ``answer`` counts from 0."""

    prompt: str
    choices: tuple[str, ...]
    answer: int

    def marked(self, choice: int) -> Marked:
        """The prompt completed with this choice, one space between where neither has any.

        The space is lm-evaluation-harness's ``target_delimiter``.
        """
        prompt, text = self.prompt, self.choices[choice]
        spaced = not prompt or prompt[-1].isspace() or text[:1].isspace()
        return joined(prompt, text if spaced else " " + text)


def choice(
    base: Base,
    *,
    prompt: str | Sequence[str],
    choices: str,
    answer: str,
    separator: str | None = None,
    max_length: int,
) -> Task:
    """The task of picking the right one of a row's choices.

    ``choices`` is a column of lists of texts, or of objects with such a list under "text" and the
    choices' names under "label"; ``answer`` gives the right one's name, or its position from 0, its
    text, or its letter (where no choice is that very text). Metrics: see ``score``.
    """
    require_offsets(base.tokenizer)
    if not base.outline:
        require_plain_logits(base.model)
    limit = base.limit(max_length).tokens

    def encode(table: Any, source: str) -> Examples:
        rows = [
            q.marked(q.answer) for q in questions(table, prompt, choices, answer, source, separator)
        ]
        return encode_marked(base.tokenizer, rows, places(source), limit, special=True, end=False)

    def encode_test(table: Any, source: str) -> Examples:
        asked = questions(table, prompt, choices, answer, source, separator)
        answers = torch.tensor([q.answer for q in asked])
        return replace(weighed(asked, source), answers=answers)

    def weighed(asked: Sequence[Question], source: str) -> Examples:
        sizes = [len(q.choices) for q in asked]
        rows = [q.marked(number) for q in asked for number in range(len(q.choices))]
        named = chain.from_iterable(map(repeat, places(source), sizes))
        found = encode_marked(base.tokenizer, rows, named, limit, special=True, end=False)
        return grouped(found, sizes)

    def predict(table: Any, source: str, run: Any, _: int) -> list[dict[str, Any]]:
        asked = questions(table, prompt, choices, None, source, separator)
        found = picked(run(weighed(asked, source))[:, 0], [len(q.choices) for q in asked])
        return [
            {"answer": number, "choice": q.choices[number]}
            for q, number in zip(asked, found.tolist(), strict=True)
        ]

    return Task(
        encode=encode,
        encode_test=encode_test,
        loss=loss,
        outputs=outputs,
        score=score,
        predict=predict,
    )


def questions(
    table: Any,
    prompt: str | Sequence[str],
    choices: str,
    answer: str | None,
    source: str,
    separator: str | None = None,
) -> list[Question]:
    """The table's rows as questions; without a column ``answer``, the first choice counts as right.

    Raises DataError naming the first row that is not one.
    """
    tables.require_columns(table, [choices, *([answer] if answer else [])], source)
    asked = zip(
        tables.prompts(table, prompt, separator, source),
        tables.cells(table, choices),
        tables.cells(table, answer) if answer else [0] * table.num_rows,
        places(source),
        strict=False,
    )
    found = []
    for text, options, right, place in asked:
        if is_lettered(options):
            letters, options = options["label"], options["text"]
            right = letters.index(right) if right in letters else right
        if (
            not isinstance(options, list)
            or len(options) < 2
            or not all(isinstance(option, str) and option.strip() for option in options)
        ):
            raise DataError(f"{place}: {choices!r} must be a list of at least two texts")
        number = _position(right, options)
        if number is None:
            raise DataError(
                f"{place}: answer {right!r} is not one of the {len(options)} choices: give its "
                "number from 0, its letter, or its exact text"
            )
        found.append(Question(text, tuple(options), number))
    return found


def _position(answer: object, options: Sequence[str]) -> int | None:
    if isinstance(answer, str):
        if options.count(answer) == 1:
            return options.index(answer)
        if answer.isascii() and answer.isdecimal():  # HellaSwag's
            return _position(int(answer), options)
        letters = string.ascii_uppercase[: len(options)]
        return letters.index(answer) if len(answer) == 1 and answer in letters else None
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        return None
    return int(answer) if answer in range(len(options)) else None


def picked(losses: Tensor, sizes: Sequence[int]) -> Tensor:
    """Of each question's choices, which ``sizes`` counts, the one with the lowest loss, from 0."""
    return torch.stack([part.argmin() for part in torch.split(losses, list(sizes))])


def score(outputs: Tensor, examples: Examples) -> dict[str, float]:
    """Metrics of the rows of ``encode_test``.

    ``choice_accuracy``: how often the right choice has the highest log-likelihood, as
    lm-evaluation-harness's ``acc``. ``choice_accuracy_norm``: the same with the log-likelihood per
    token; that program's ``acc_norm`` divides by characters instead. ``loss`` and ``perplexity``
    are those of the right choices. Of equals the first is taken.
    """
    if examples.groups is None or examples.answers is None:
        raise ValueError("choices are scored on the examples of encode_test")
    sizes = examples.groups.bincount()
    hits = {"choice_accuracy": outputs[:, 0], "choice_accuracy_norm": outputs[:, 0] / outputs[:, 1]}
    metrics = {}
    for name, values in hits.items():
        found = picked(values, sizes.tolist())
        metrics[name] = float((found == examples.answers).double().mean())
    right = sizes.cumsum(0) - sizes + examples.answers
    return metrics | score_completions(outputs[right], examples)
