"""What language models wrote for the same test prompts, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rolora.results.runs import RunRecord, Written


@dataclass(frozen=True)
class Sample:
    """A prompt, what its row goes on with, and (who, answer) of all who were asked."""

    prompt: str
    expected: str
    answers: list[tuple[str, str]]


def side_by_side(groups: Mapping[str, Sequence[RunRecord]]) -> list[Sample]:
    """Each prompt once, with the answers of each method's first seed that was asked any.

    Only of one seed, because seeds may differ in their test rows and so in their prompts. The
    answers before training come first; methods that start from the same one share it.
    """
    said: dict[tuple[str, str], dict[str, Written]] = {}
    for method, runs in groups.items():
        asked = [run for run in runs if run.samples]
        for run in sorted(asked, key=lambda run: run.seed)[:1]:
            for one in run.samples:
                said.setdefault((one.prompt, one.expected), {}).setdefault(method, one)
    found = []
    for (prompt, expected), by_method in said.items():
        before = [(f"{method}, before", one.before) for method, one in by_method.items()]
        if len({text for _, text in before}) == 1:
            before = [("before", before[0][1])]
        after = [(f"{method}, after", one.after) for method, one in by_method.items()]
        found.append(Sample(prompt, expected, [*before, *after]))
    return found
