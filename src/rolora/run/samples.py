"""What a language model writes for a few test prompts, before and after its training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.seeding import generator
from rolora.run.experiment import Experiment
from rolora.tasks.generation import generate
from rolora.tasks.spans import last_span

TOKENS = 48  # that are written for a prompt
CHARACTERS = 1000  # of a prompt, its end, and of what is expected, its beginning
TRIED = 50  # rows; where none of them has a prompt, none will


def samples(experiment: Experiment, adapter: AdapterState) -> list[dict[str, str]]:
    """``eval.samples`` test prompts, what their rows go on with ("expected"), and the greedy
    answers with the adapter that the run started from ("before") and with this one ("after").

    Rows are drawn without the run's seed, so that all runs on the same rows have the same. Empty
    for a task or rows without prompts, for a run that leaves the test rows alone, and where clients
    keep a part of the adapter.
    """
    config, base = experiment.config, experiment.base
    wanted = config.eval.samples if config.eval.rows == "test" else 0
    if not (wanted and experiment.kind.answers) or experiment.method.personal_roles:
        return []
    drawn = list(islice(_prompts(experiment), wanted))
    asked = [prompt for prompt, _ in drawn]
    most = min(TOKENS, base.limit(1 << 30).tokens // 2)
    written = []
    for held in (experiment.start.server.adapter, adapter):
        with base.holding(held):
            written.append(generate(base, asked, most))

    def text(tokens: list[int]) -> str:
        return str(base.tokenizer.decode(tokens, skip_special_tokens=True))

    return [
        {
            "prompt": text(prompt)[-CHARACTERS:],
            "expected": text(right)[:CHARACTERS],
            "before": before,
            "after": after,
        }
        for (prompt, right), before, after in zip(drawn, *written, strict=True)
    ]


def _prompts(experiment: Experiment) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of prompt and completion of test rows that have a prompt, in the order of the draw."""
    examples, tokenizer = experiment.test, experiment.base.tokenizer
    groups = torch.arange(len(examples)) if examples.groups is None else examples.groups
    lasts = groups.bincount().cumsum(0) - 1
    order = torch.randperm(len(lasts), generator=generator(0, "samples"))
    for row in lasts[order[:TRIED]].tolist():
        prompt, completion = last_span(examples, row)
        if tokenizer.decode(prompt, skip_special_tokens=True).strip():
            yield prompt, completion
