"""Many updates into one: the only place where what clients sent is combined.

A reducer is three functions over a running memory, so that it may stream. It sees values in the
space that the method chose (usually the moving factors), each with the reference that the client
started from and a weight. Wrappers take a reducer and return a reducer, so that clipping a median
is ``clip(median(), norm=1.0)``, and server momentum on that ``fedavgm(clip(median(), norm=1.0))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Value = Mapping[str, Tensor]
Memory = Mapping[str, Any]


class Reducer(NamedTuple):
    """``init()`` -> memory; ``add(memory, value, reference, weight)`` -> memory, once per client in
    order of the cohort; ``finish(memory, rng)`` -> (reduced value, memory kept for the next round).

    ``add`` may change what it has put into the memory itself, in place; never a value or reference.
    The memory that ``finish`` returns holds tensors keyed by tensor name, because it is saved in
    checkpoints; what ``add`` collects is gone after ``finish``.
    """

    init: Callable[[], Memory]
    add: Callable[[Memory, Value, Value, float], Memory]
    finish: Callable[[Memory, torch.Generator], tuple[Value, Memory]]


_BLOCK = 1 << 16  # elements; as float64 they take 512 KiB and stay in a core's cache


def zeros_like(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Where a running sum of tensors of these shapes starts: -0.0, since 0.0 + -0.0 is not -0.0."""
    return [torch.full(tensor.shape, -0.0, dtype=dtype) for tensor in tensors]


def add_(totals: Iterable[Tensor], tensors: Iterable[Tensor], weight: float) -> None:
    """``total += weight * tensor`` for each pair, in place, in the dtype of the totals.

    A float32 value times a whole number below 2**29 is exact in float64, so there each step rounds
    once. Large tensors go in blocks, so that what is converted never leaves the cache.
    """
    sums: list[Tensor] = []
    terms: list[Tensor] = []
    for total, tensor in zip(totals, tensors, strict=True):
        if total.numel() <= _BLOCK:
            sums.append(total)
            terms.append(tensor)
        else:
            sums.extend(torch.split(total.view(-1), _BLOCK))
            terms.extend(torch.split(tensor.reshape(-1), _BLOCK))
    if sums:
        torch._foreach_add_(sums, terms, alpha=weight)


def mean(dtype: torch.dtype = torch.float64) -> Reducer:
    """Weighted arithmetic mean (McMahan et al. 2017, FedAvg), summed in ``dtype``, streaming.

    float64 sums of float32 updates lose nothing that shows, in any order and any number of parts;
    float32 is faster and rounds at every client.
    """

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        if "sum" not in memory:
            like = {name: tensor.dtype for name, tensor in value.items()}
            start = dict(zip(like, zeros_like(value.values(), dtype), strict=True))
            memory = {"sum": start, "weight": 0.0, "like": like}
        total = memory["sum"]
        add_(total.values(), (value[name] for name in total), weight)
        return {**memory, "weight": memory["weight"] + weight}

    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        weight, like = memory["weight"], memory["like"]
        return {name: (t / weight).to(like[name]) for name, t in memory["sum"].items()}, {}

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


def fedavgm(inner: Reducer, lr: float = 1.0, momentum: float = 0.9) -> Reducer:
    """Server momentum (FedAvgM: Hsu et al. 2019, arXiv:1909.06335) on what ``inner`` reduces.

    With Δ the reduced value minus the reference: m ← ``momentum`` · m + Δ, and the new value is the
    reference + ``lr`` · m; m starts at 0. Without momentum, at lr 1, it is ``inner`` itself.
    """
    if not (lr > 0 and 0 <= momentum < 1):
        raise ValueError(f"fedavgm: lr > 0 and 0 <= momentum < 1, got {lr} and {momentum}")

    def rule(move: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        m = momentum * m + move
        return lr * m, m

    return _remembering(inner, {"momentum": 0.0}, rule)


def fedadam(
    inner: Reducer, lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Reducer:
    """Adam at the server (FedAdam: Reddi et al. 2021, arXiv:2003.00295, Algorithm 2).

    With Δ the reduced value minus the reference: m ← β1 m + (1 − β1) Δ and v ← β2 v + (1 − β2) Δ²,
    elementwise; the new value is the reference + ``lr`` · m / (√v + τ). m starts at 0, v at τ², and
    nothing corrects for that, as in the paper.
    """
    if not (lr > 0 and tau > 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"fedadam: lr, tau > 0 and 0 <= betas < 1, got {lr, tau, beta1, beta2}")

    def rule(move: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = beta1 * m + (1 - beta1) * move
        v = beta2 * v + (1 - beta2) * move.square()
        return lr * m / (v.sqrt() + tau), m, v

    return _remembering(inner, {"momentum": 0.0, "square": tau**2}, rule)


def _remembering(
    inner: Reducer, start: Mapping[str, float], rule: Callable[..., tuple[Tensor, ...]]
) -> Reducer:
    """A server optimiser: ``rule(move, *remembered)`` -> (step, *remembered), in float64.

    ``start`` names what is remembered of each tensor and what it is at first. The memory goes by
    tensor name, so that of a factor waits, as it is, while another factor is reduced. Every client
    must have started from the same reference.
    """
    own = tuple(f"{kind}/" for kind in start)

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        if "reference" not in memory:
            held = {key: tensor for key, tensor in memory.items() if key.startswith(own)}
            rest = {key: tensor for key, tensor in memory.items() if key not in held}
            memory = {"reference": reference, "held": held, "inner": rest or inner.init()}
        return {**memory, "inner": inner.add(memory["inner"], value, reference, weight)}

    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        reduced, kept = inner.finish(memory["inner"], rng)
        held, stepped = dict(memory["held"]), {}
        for name, tensor in reduced.items():
            before = memory["reference"][name].double()
            was = [
                held[f"{kind}/{name}"].double()
                if f"{kind}/{name}" in held
                else torch.full_like(before, first)
                for kind, first in start.items()
            ]
            step, *now = rule(tensor.double() - before, *was)
            stepped[name] = (before + step).to(tensor.dtype)
            for kind, remembered in zip(start, now, strict=True):
                held[f"{kind}/{name}"] = remembered.to(tensor.dtype)
        return stepped, {**held, **kept}

    return Reducer(dict, add, finish)
