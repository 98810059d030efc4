"""Norms and effective rank of the server's factors, by layer and by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rolora.results.runs import Measured, RunRecord, over_seeds

# a measure's name in ``rounds.jsonl`` -> its title, and what it is
MEASURES = {
    "effective_rank": (
        "effective rank of B·A",
        "The exponential of the entropy of the singular values, as shares of their sum (Roy & "
        "Vetterli 2007): 1 if the change has one direction, the factors' rank if all weigh the "
        "same.",
    ),
    "norm_A": ("norm of A", "Frobenius norm of the server's lora_A."),
    "norm_B": ("norm of B", "Frobenius norm of the server's lora_B."),
}


class Layer(NamedTuple):
    """A layer of a method's runs at their end: measure -> its value over seeds."""

    method: str
    layer: str
    values: Mapping[str, Measured | None]


def known(run: RunRecord, measure: str) -> dict[int, list[float]]:
    """Round -> the values of the layers that have one."""
    each = {line["round"]: line["layers"].get(measure, ()) for line in run.rounds}
    values = {round: [v for v in own if v is not None] for round, own in each.items()}
    return {round: own for round, own in values.items() if own}


def last_layers(groups: Mapping[str, Sequence[RunRecord]]) -> list[Layer]:
    """Every layer of every method, at the last evaluation."""
    found = []
    for method, runs in groups.items():
        each = [_last(run) for run in runs]
        for layer in dict.fromkeys(layer for own in each for _, layer in own):
            values = {m: over_seeds([own.get((m, layer)) for own in each]) for m in MEASURES}
            found.append(Layer(method, layer.removeprefix("base_model.model."), values))
    return found


def _last(run: RunRecord) -> dict[tuple[str, str], float | None]:
    """(measure, layer) -> the value at the last evaluation."""
    measured = [line["layers"] for line in run.rounds if line["layers"]]
    return {
        (measure, layer): value
        for measure, values in (measured[-1].items() if measured else ())
        for layer, value in zip(run.axes.layers, values, strict=True)
    }
