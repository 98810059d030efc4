"""How often each label is found: the recall of the labels, method by method."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rolora.results.runs import Measured, RunRecord, over_seeds, phase


@dataclass(frozen=True)
class LabelRecall:
    """A label, its rows among those that are evaluated on (None if runs differ in them), and
    method -> ``recalls`` over the seeds that have such rows."""

    label: str
    rows: int | None
    methods: Mapping[str, Measured]


def recalls(run: RunRecord) -> dict[str, float]:
    """Label -> its last recall, a mean over phases as ``RunRecord.scores``; {} without labels."""
    trained = [line for line in run.rounds if line["round"] and line["recall"]]
    latest = {phase(line): line["recall"] for line in trained}
    means = map(statistics.fmean, zip(*latest.values(), strict=True))
    return dict(zip(run.axes.labels, means, strict=True)) if latest else {}


def label_recalls(groups: Mapping[str, Sequence[RunRecord]]) -> list[LabelRecall]:
    """All labels, the least found first; of methods all of whose runs recorded them."""
    each = {method: [recalls(run) for run in runs] for method, runs in groups.items()}
    known = {method: own for method, own in each.items() if all(own)}
    rows = [run.axes.labels for method in known for run in groups[method]]
    found = []
    for label in dict.fromkeys(label for one in rows for label in one):
        own = {
            m: over_seeds([run[label] for run in runs if label in run]) for m, runs in known.items()
        }
        counts = {one.get(label) for one in rows}
        count = counts.pop() if len(counts) == 1 else None
        found.append(LabelRecall(label, count, {m: one for m, one in own.items() if one}))
    return sorted(found, key=lambda one: statistics.fmean(m for m, _ in one.methods.values()))
