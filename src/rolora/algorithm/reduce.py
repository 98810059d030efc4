"""Many updates into one: the only place where what clients sent is combined.

A reducer is three functions over a running memory, so it can stream. It sees tensors in the space
that the method chose (usually the trained factors), each with the reference that the client started
from and a weight.

A rule is ``factory(*, option=...) -> Reducer``; a wrapper, such as clipping or a server optimiser,
is ``factory(inner, *, option=...) -> Reducer``. ``compose`` puts them together by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rolora.algorithm.choices import REDUCERS
from rolora.errors import ConfigError

Value = Mapping[str, Tensor]
Memory = Mapping[str, Any]
Combine = Callable[[Sequence[Value], Value, torch.Generator], tuple[Value, Tensor]]


class Reducer(NamedTuple):
    """``init()`` -> memory; ``add(memory, value, reference, weight)`` -> memory, once per client in
    the order of the cohort; ``finish(memory, rng)`` -> (reduced value, memory for the next round).
    ``least``: the fewest clients that it can reduce; with fewer a round does not advance.
    ``trusting``: it takes its first client for a trusted one, by which it judges the others.

    ``add`` may change in place what it has put into the memory, but no value or reference. In a run
    ``reference`` is an ``AdapterState``: beside what the value's tensors were before, it has the
    rest of the adapter, and so what the value does to the model. The memory that ``finish`` returns
    is saved in checkpoints, so it maps names to tensors. Under the name ``CLIENT_WEIGHTS`` it may
    have the weight (clients,) of each client in the reduced value: a mean over coordinates, in the
    order of ``add``. It is recorded and not kept. Without it, all clients count as used.

    >>> reducer = compose([("clip", {"norm": 1.0}), ("mean", {})])
    >>> memory, start = reducer.init(), {"x": torch.zeros(2)}
    >>> for move in ([0.5, 0.0], [0.0, 9.0]):  # the second is clipped
    ...     memory = reducer.add(memory, {"x": torch.tensor(move)}, start, 1.0)
    >>> reducer.finish(memory, torch.Generator())[0]
    {'x': tensor([0.2500, 0.5000])}
    """

    init: Callable[[], Memory]
    add: Callable[[Memory, Value, Value, float], Memory]
    finish: Callable[[Memory, torch.Generator], tuple[Value, Memory]]
    least: int = 1
    trusting: bool = False


CLIENT_WEIGHTS = "client_weights"


def is_wrapper(name: str) -> bool:
    """Whether the reducer of this name takes another one. ConfigError for an unknown name."""
    options = REDUCERS.options(name)
    parameters = signature(REDUCERS.factory(name)).parameters.values()
    given = [one for one in parameters if one.name not in options]
    if len(given) > 1 or any(one.default is not one.empty for one in given):
        raise ConfigError(
            f"reducer {name!r}: option {given[-1].name!r} must be keyword-only: put * before it"
        )
    return bool(given)


def compose(rules: Sequence[tuple[str, Mapping[str, Any]]]) -> Reducer:
    """The reducer of these names and options: wrappers first, the rule that they wrap last.

    Raises ConfigError for an unknown name or option, for a rule or a wrapper in the wrong place,
    and for a name that is given twice.
    """
    names = [name for name, _ in rules]
    for place, name in enumerate(names, start=1):
        if names.count(name) > 1:
            raise ConfigError(f"reducer {name!r} is given twice in {names}")
        if is_wrapper(name) and place == len(names):
            raise ConfigError(f"reducer {name!r} wraps another one: add a rule, such as 'mean'")
        if not is_wrapper(name) and place < len(names):
            raise ConfigError(f"reducer {name!r} wraps no other: put it last in {names}")
    *wrappers, (rule, options) = rules
    reducer: Reducer = REDUCERS.make(rule, **options)
    for name, options in reversed(wrappers):
        wrapped: Reducer = REDUCERS.make(name, reducer, **options)
        # a wrapper of another package may have made a Reducer of three functions alone
        reducer = wrapped._replace(
            least=max(wrapped.least, reducer.least), trusting=wrapped.trusting or reducer.trusting
        )
    return reducer


_BLOCK = 1 << 16  # elements; as float64 they take 512 KiB and stay in a core's cache


def zeros_like(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Start of a running sum of tensors of these shapes: -0.0, since 0.0 + -0.0 is not -0.0."""
    return [torch.full(tensor.shape, -0.0, dtype=dtype) for tensor in tensors]


def add_(totals: Iterable[Tensor], tensors: Iterable[Tensor], weight: float) -> None:
    """``total += weight * tensor`` for each pair, in place, in the dtype of the totals.

    A float32 value times a whole number below 2**29 is exact in float64, so each step rounds once.
    Large tensors are added in blocks, so that converted values stay in the cache.
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


def mean(*, dtype: Literal["float64", "float32"] = "float64") -> Reducer:
    """Weighted arithmetic mean (McMahan et al. 2017, FedAvg), summed in ``dtype``, streaming.

    float64 sums of float32 updates lose nothing that matters, whatever the order of clients;
    float32 is faster and rounds at every client.
    """
    precision = {"float64": torch.float64, "float32": torch.float32}[dtype]

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        if "sum" not in memory:
            like = {name: tensor.dtype for name, tensor in value.items()}
            start = dict(zip(like, zeros_like(value.values(), precision), strict=True))
            memory = {"sum": start, "weight": 0.0, "like": like}
        total = memory["sum"]
        add_(total.values(), (value[name] for name in total), weight)
        return {**memory, "weight": memory["weight"] + weight}

    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        weight, like = memory["weight"], memory["like"]
        return {name: (t / weight).to(like[name]) for name, t in memory["sum"].items()}, {}

    return Reducer(dict, add, finish)


def median(*, byzantine: int = 0) -> Reducer:
    """Coordinate-wise median (Yin et al. 2018, Alg. 1, option I). Ignores weights.

    With an even number of clients, the mean of the two middle values. ``byzantine`` = f bad clients
    need n ≥ 2 f + 1.
    """
    f = bad_ones("median", byzantine)
    return _sorted_rule("median", lambda count: (count - 1) // 2, 2 * f + 1)


def trimmed_mean(*, trim: float = 0.1, byzantine: int = 0) -> Reducer:
    """Coordinate-wise trimmed mean (Yin et al. 2018, Alg. 1, option II). Ignores weights.

    ``trim`` in [0, 0.5) is the share cut at *each* end, rounded up to whole clients (the number of
    bad clients to tolerate), but at least one client is left. With ``byzantine`` = f > 0, f clients
    are cut at each end instead, and n ≥ 2 f + 1.
    """
    if not 0 <= trim < 0.5:
        raise ConfigError(f"trimmed_mean: trim must be in [0, 0.5), not {trim}")
    if f := bad_ones("trimmed_mean", byzantine):
        return _sorted_rule("trimmed_mean", lambda count: f, 2 * f + 1)

    def cut(count: int) -> int:
        # round() first: in binary 0.1 * 30 is slightly above 3
        return min(math.ceil(round(trim * count, 9)), (count - 1) // 2)

    return _sorted_rule("trimmed_mean", cut, 1)


def bad_ones(name: str, byzantine: int) -> int:
    """``byzantine`` of the rule with this name. ConfigError if it is below 0."""
    if byzantine < 0:
        raise ConfigError(f"{name}: byzantine must be at least 0, not {byzantine}")
    return byzantine


def holding(name: str, least: int, combine: Combine) -> Reducer:
    """A rule over all updates at once: ``combine(values, start, rng)`` -> value and weights."""

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        start = memory.get("start", reference)
        return {"start": start, "values": [*memory.get("values", []), value]}

    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        values = memory["values"]
        if len(values) < least:
            raise ValueError(f"{name} needs {least} updates, but there are {len(values)}")
        reduced, weights = combine(values, memory["start"], rng)
        return reduced, {CLIENT_WEIGHTS: weights}

    return Reducer(dict, add, finish, least)


def _sorted_rule(name: str, cut: Callable[[int], int], least: int) -> Reducer:
    def combine(
        values: Sequence[Value], start: Value, rng: torch.Generator
    ) -> tuple[Value, Tensor]:
        k = cut(len(values))
        reduced = {}
        kept = torch.zeros(len(values), dtype=torch.float64)
        for name, like in values[0].items():
            stack = torch.stack([value[name] for value in values]).double()
            ordered, order = stack.sort(dim=0, stable=True)
            reduced[name] = ordered[k : len(values) - k].mean(dim=0).to(like.dtype)
            middle = order[k : len(values) - k].reshape(-1)
            kept += torch.bincount(middle, minlength=len(values))
        return reduced, coordinate_weights(kept)

    return holding(name, least, combine)


def coordinate_weights(kept: Tensor) -> Tensor:
    """Each client's weight (clients,), from how many of its coordinates a rule kept."""
    return kept / kept.sum() if kept.any() else torch.full_like(kept, 1 / len(kept))


def clip(inner: Reducer, *, norm: float) -> Reducer:
    """Scale each client's move (value − reference) down to at most ``norm``, then reduce.

    The norm is L2 over all tensors of the value together, in float64.
    """
    if not norm > 0:
        raise ConfigError(f"clip: norm must be positive, not {norm}")

    def scale_of(value: Value, reference: Value) -> float:
        size = _square(value, reference) ** 0.5
        return norm / size if size > norm else 1.0

    return scaling(inner, scale_of)


def scaling(inner: Reducer, scale_of: Callable[[Value, Value], float]) -> Reducer:
    """Each client's move times ``scale_of(value, reference)``, then ``inner``."""

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        if "scales" not in memory:
            memory = {"scales": [], "inner": memory or inner.init()}
        scale = scale_of(value, reference)
        kept = value if scale == 1 else moved(value, reference, scale)
        added = inner.add(memory["inner"], kept, reference, weight)
        return {"scales": [*memory["scales"], scale], "inner": added}

    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        reduced, kept = inner.finish(memory["inner"], rng)
        scales = torch.tensor(memory["scales"], dtype=torch.float64)
        weights = kept.get(CLIENT_WEIGHTS, torch.full_like(scales, 1 / len(scales)))
        return reduced, {**kept, CLIENT_WEIGHTS: weights * scales}

    return inner._replace(init=dict, add=add, finish=finish)


def moved(value: Value, reference: Value, scale: float) -> Value:
    """reference + ``scale`` · (value − reference) in float64, in the dtypes of the value."""
    return {
        name: (reference[name].double() + (tensor.double() - reference[name].double()) * scale).to(
            tensor.dtype
        )
        for name, tensor in value.items()
    }


def fedavgm(inner: Reducer, *, lr: float = 1.0, momentum: float = 0.9) -> Reducer:
    """Server momentum (FedAvgM: Hsu et al. 2019, arXiv:1909.06335) on what ``inner`` reduces.

    With Δ the reduced value minus the reference: m ← ``momentum`` · m + Δ, and the new value is the
    reference + ``lr`` · m; m starts at 0. With momentum 0 and lr 1 it is ``inner`` itself.
    """
    if not (lr > 0 and 0 <= momentum < 1):
        raise ConfigError(
            f"fedavgm: lr must be positive and momentum in [0, 1), not {lr} and {momentum}"
        )

    def rule(move: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        m = momentum * m + move
        return lr * m, m

    return _remembering(inner, {"momentum": 0.0}, rule)


def fedadam(
    inner: Reducer,
    *,
    lr: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Reducer:
    """Adam at the server (FedAdam: Reddi et al. 2021, arXiv:2003.00295, Algorithm 2).

    With Δ the reduced value minus the reference: m ← β1 m + (1 − β1) Δ and v ← β2 v + (1 − β2) Δ²,
    elementwise; the new value is the reference + ``lr`` · m / (√v + τ). m starts at 0 and v at τ²,
    without bias correction, as in the paper.
    """
    if not (lr > 0 and tau > 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ConfigError(
            "fedadam: lr and tau must be positive, beta1 and beta2 in [0, 1), not "
            f"{lr}, {tau}, {beta1} and {beta2}"
        )

    def rule(move: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = beta1 * m + (1 - beta1) * move
        v = beta2 * v + (1 - beta2) * move.square()
        return lr * m / (v.sqrt() + tau), m, v

    return _remembering(inner, {"momentum": 0.0, "square": tau**2}, rule)


def fedexp(*, epsilon: float = 1e-3) -> Reducer:
    """The mean, with a longer step where moves point apart (FedExP: Jhunjhunwala et al. 2023).

    With Δᵢ a client's move, pᵢ its share of the weights and Δ their weighted mean, the value is the
    reference + max(1, Σ pᵢ ‖Δᵢ‖² / (2 (‖Δ‖² + ``epsilon``))) · Δ, with norms over all tensors
    together, in float64. It is a rule and no wrapper: it steps by the sizes of all moves that it
    is given, so a rule that cuts some of them could not protect it. arXiv:2301.09604, equation 6.
    """
    if not epsilon > 0:
        raise ConfigError(f"fedexp: epsilon must be positive, not {epsilon}")
    inner = mean()

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        square = memory.get("square", 0.0) + weight * _square(value, reference)
        added = inner.add(memory.get("inner", {}), value, reference, weight)
        return {"reference": reference, "square": square, "inner": added}

    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        reference, total = memory["reference"], memory["inner"]["weight"]
        reduced, _ = inner.finish(memory["inner"], rng)
        length = memory["square"] / total / (2 * (_square(reduced, reference) + epsilon))
        return moved(reduced, reference, length) if length > 1 else reduced, {}

    return Reducer(dict, add, finish)


def _square(value: Value, reference: Value) -> float:
    """‖value − reference‖² over all tensors of the value together, in float64."""
    moves = (tensor.double() - reference[name].double() for name, tensor in value.items())
    return sum(float(move.square().sum()) for move in moves)


def _remembering(
    inner: Reducer, start: Mapping[str, float], rule: Callable[..., tuple[Tensor, ...]]
) -> Reducer:
    """A server optimiser: ``rule(move, *remembered)`` -> (step, *remembered), in float64.

    ``start`` maps the name of each quantity that is remembered of a tensor to its first value. The
    memory goes by tensor name, so a factor's memory does not change while the other factor is
    reduced. All clients must have started from the same reference.
    """

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        if "reference" not in memory:
            inside = {key: tensor for key, tensor in memory.items() if key.startswith("inner/")}
            held = {key: tensor for key, tensor in memory.items() if key not in inside}
            rest = {key.removeprefix("inner/"): tensor for key, tensor in inside.items()}
            memory = {"reference": reference, "held": held, "inner": rest or inner.init()}
        return {**memory, "inner": inner.add(memory["inner"], value, reference, weight)}

    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        reduced, kept = inner.finish(memory["inner"], rng)
        held, stepped = dict(memory["held"]), {}
        passed = {key: tensor for key, tensor in kept.items() if key == CLIENT_WEIGHTS}
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
        inside = {f"inner/{key}": tensor for key, tensor in kept.items() if key not in passed}
        return stepped, {**held, **inside, **passed}

    return inner._replace(init=dict, add=add, finish=finish)
