"""Many updates into one: the only place where what clients sent is combined.

A reducer is three functions over a running memory, so that it may stream. It sees values in the
space that the method chose (usually the moving factors), each with the reference that the client
started from and a weight. Wrappers take a reducer and return a reducer, so that clipping a median
is ``clip(median(), norm=1.0)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Value = Mapping[str, Tensor]
Memory = Mapping[str, Any]


class Reducer(NamedTuple):
    """``init()`` -> memory; ``add(memory, value, reference, weight)`` -> memory, once per client in
    order of client id; ``finish(memory, rng)`` -> (reduced value, memory kept for the next round).

    The memory that ``finish`` returns holds tensors keyed by tensor name, because it is saved in
    checkpoints; what ``add`` collects is gone after ``finish``.
    """

    init: Callable[[], Memory]
    add: Callable[[Memory, Value, Value, float], Memory]
    finish: Callable[[Memory, torch.Generator], tuple[Value, Memory]]


def mean() -> Reducer:
    """Weighted arithmetic mean (McMahan et al. 2017, FedAvg), summed in float64, streaming."""

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        total = memory.get("sum")
        terms = {name: tensor.double() * weight for name, tensor in value.items()}
        if total is not None:
            terms = {name: total[name] + term for name, term in terms.items()}
        return {"sum": terms, "weight": memory.get("weight", 0.0) + weight, "like": value}

    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        weight, like = memory["weight"], memory["like"]
        return {n: (t / weight).to(like[n].dtype) for n, t in memory["sum"].items()}, {}

    return Reducer(dict, add, finish)


def median() -> Reducer:
    """Coordinate-wise median (Yin et al. 2018, Alg. 1, option I). Ignores weights.

    With an even number of clients, the mean of the two middle values.
    """
    return _sorted_rule(lambda count: (count - 1) // 2)


def trimmed_mean(trim: float = 0.1) -> Reducer:
    """Coordinate-wise trimmed mean (Yin et al. 2018, Alg. 1, option II). Ignores weights.

    ``trim`` in [0, 0.5) is the share cut off at *each* end, rounded up to whole clients (the
    number of bad clients one wants to survive), but never so many that none is left.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim must lie in [0, 0.5), got {trim}")
    # round() first: 0.1 * 30 is a hair over 3 in binary
    return _sorted_rule(lambda count: min(math.ceil(round(trim * count, 9)), (count - 1) // 2))


def _sorted_rule(cut: Callable[[int], int]) -> Reducer:
    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        return {"values": [*memory.get("values", []), value]}

    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        values = memory["values"]
        k = cut(len(values))
        reduced = {}
        for name, like in values[0].items():
            ordered = torch.stack([value[name] for value in values]).double().sort(dim=0).values
            reduced[name] = ordered[k : len(values) - k].mean(dim=0).to(like.dtype)
        return reduced, {}

    return Reducer(dict, add, finish)


def clip(inner: Reducer, norm: float) -> Reducer:
    """Scale each client's move (value − reference) to at most ``norm``, then reduce.

    The norm is L2 over all tensors of the value together, in float64.
    """
    if not norm > 0:
        raise ValueError(f"clip_norm must be positive, got {norm}")

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        moves = {name: tensor.double() - reference[name].double() for name, tensor in value.items()}
        size = sum(float(move.square().sum()) for move in moves.values()) ** 0.5
        if size > norm:
            value = {
                name: (reference[name].double() + move * (norm / size)).to(value[name].dtype)
                for name, move in moves.items()
            }
        return inner.add(memory, value, reference, weight)

    return Reducer(inner.init, add, inner.finish)
