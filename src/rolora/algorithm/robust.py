"""Rules that withstand clients who send anything, and steps to take before a rule.

Of n updates, up to ``byzantine`` = f may be anything. A round's updates are held until the last one
has arrived. Weights are ignored, since a client could lie about its rows. Distances are those
of ``rolora.algorithm.effect``: between what clients do to the model, over all layers together.
Ties go to the client that comes first in the cohort. Everything is computed in float64.

With fewer updates than a rule needs (``Reducer.least``), a round does not advance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rolora.algorithm.effect import inner_products, squared_distances
from rolora.algorithm.reduce import (
    CLIENT_WEIGHTS,
    Memory,
    Reducer,
    Value,
    bad_ones,
    coordinate_weights,
    holding,
    moved,
    scaling,
)
from rolora.errors import ConfigError


def krum(*, byzantine: int = 0) -> Reducer:
    """The one update with the nearest neighbours (Blanchard et al. 2017, Krum); n ≥ 2 f + 3.

    The score of an update is the sum of its squared distances to the n − f − 1 nearest others, as
    in Allouah et al. 2023 (arXiv:2302.01772); the first paper takes n − f − 2.
    """
    f = bad_ones("krum", byzantine)

    def weigh(gram: Tensor) -> Tensor:
        apart = squared_distances(gram)
        return _equal_weights([int(_scores(apart, f).argmin())], len(gram))

    return _weighing("krum", 2 * f + 3, weigh)


def multi_krum(*, byzantine: int = 0) -> Reducer:
    """The mean of the n − f updates with the best scores of ``krum``; n ≥ 2 f + 3.

    Blanchard et al. 2017, Multi-Krum with m = n − f, as in Allouah et al. 2023.
    """
    f = bad_ones("multi_krum", byzantine)

    def weigh(gram: Tensor) -> Tensor:
        ranked = _scores(squared_distances(gram), f).argsort(stable=True)
        return _equal_weights(ranked[: len(gram) - f].tolist(), len(gram))

    return _weighing("multi_krum", 2 * f + 3, weigh)


def bulyan(*, byzantine: int = 0) -> Reducer:
    """Krum's choices, then the middle of each coordinate (El Mhamdi et al. 2018); n ≥ 4 f + 3.

    ``krum`` chooses θ = n − 2 f updates, one after the other, each among those left. Each
    coordinate is the mean of the θ − 2 f chosen values nearest to their median (with an even
    number, the mean of the two middle ones). The choice goes by what updates do to the model, the
    second part by the coordinates of what is reduced.
    """
    f = bad_ones("bulyan", byzantine)

    def combine(
        values: Sequence[Value], start: Value, rng: torch.Generator
    ) -> tuple[Value, Tensor]:
        apart = squared_distances(inner_products(values, start))
        left, chosen = list(range(len(values))), list[int]()
        while len(chosen) < len(values) - 2 * f:
            scores = _scores(apart[left][:, left], f)
            chosen.append(left.pop(int(scores.argmin())))
        near = len(chosen) - 2 * f
        reduced: dict[str, Tensor] = {}
        kept = torch.zeros(len(chosen), dtype=torch.float64)
        for name, like in values[0].items():
            stack = torch.stack([values[client][name] for client in chosen]).double()
            ordered, order = stack.sort(dim=0, stable=True)
            middle = (ordered[(len(chosen) - 1) // 2] + ordered[len(chosen) // 2]) / 2
            nearest = (ordered - middle).abs().argsort(dim=0, stable=True)[:near]
            reduced[name] = ordered.gather(0, nearest).mean(dim=0).to(like.dtype)
            kept += torch.bincount(order.gather(0, nearest).reshape(-1), minlength=len(chosen))
        weights = torch.zeros(len(values), dtype=torch.float64)
        weights[chosen] = coordinate_weights(kept)
        return reduced, weights

    return holding("bulyan", 4 * f + 3, combine)


def geometric_median(*, byzantine: int = 0, smoothing: float = 1e-6) -> Reducer:
    """The point with the least sum of distances to all updates; n ≥ 2 f + 1.

    By the smoothed Weiszfeld algorithm (Pillutla et al. 2022, RFA, Algorithm 2), until no weight
    changes by 1e-12: weights are 1 / max(distance, ν). ν is ``smoothing`` times the median distance
    of the step. It starts from the mean of the more than n / 2 updates around the most central one.
    Where both factors move, the product of a mean is taken to be the mean of the products.
    """
    f = bad_ones("geometric_median", byzantine)
    if not smoothing > 0:
        raise ConfigError(f"geometric_median: smoothing must be positive, not {smoothing}")

    def weigh(gram: Tensor) -> Tensor:
        apart, half = squared_distances(gram), len(gram) // 2 + 1
        central = int(apart.sort(dim=1).values[:, half - 1].argmin())
        nearest = apart[central].argsort(stable=True)[:half]
        weights = _equal_weights(nearest.tolist(), len(gram))
        for _ in range(1000):
            distances = _distances(gram, weights)
            least = smoothing * float(distances.median())
            if not least:  # more than half of the updates are at this very point
                break
            before, weights = weights, 1 / distances.clamp_min(least)
            weights = weights / weights.sum()
            if float((weights - before).abs().max()) < 1e-12:
                break
        return weights

    return _weighing("geometric_median", 2 * f + 1, weigh)


def centered_clip(
    *, byzantine: int = 0, radius: float | None = None, iterations: int = 5
) -> Reducer:
    """Means of moves that are clipped around the last result (Karimireddy et al. 2021, Eq. (CC)).

    v ← v + (1/n) Σ (x_i − v) · min(1, τ / ‖x_i − v‖), ``iterations`` times, from where the round
    started; n ≥ 2 f + 1. τ is ``radius``, or the median of the distances of the step, which follows
    each round: moves of lora_A and of lora_B differ in size. Where both factors move, the product
    of a mean is taken to be the mean of the products.
    """
    f = bad_ones("centered_clip", byzantine)
    if radius is not None and not radius > 0:
        raise ConfigError(f"centered_clip: radius must be positive, not {radius}")
    if iterations < 1:
        raise ConfigError(f"centered_clip: iterations must be at least 1, not {iterations}")

    def weigh(gram: Tensor) -> Tensor:
        weights = torch.zeros(len(gram), dtype=torch.float64)  # what is left is the start's
        for _ in range(iterations):
            distances = _distances(gram, weights)
            bound = float(distances.median()) if radius is None else radius
            share = torch.where(distances > bound, bound / distances, 1.0) / len(gram)
            weights = weights * (1 - share.sum()) + share
        return weights

    def combine(
        values: Sequence[Value], start: Value, rng: torch.Generator
    ) -> tuple[Value, Tensor]:
        weights = weigh(inner_products(values, start))
        return _from_start(values, start, weights), weights

    return holding("centered_clip", 2 * f + 1, combine)


def fltrust(*, byzantine: int = 0) -> Reducer:
    """Moves as long as a trusted client's, by how far they agree with it; n ≥ f + 2.

    FLTrust (Cao et al. 2021, arXiv:2012.13995, Algorithm 2). The first update is that of a client
    that the server's own party runs: its move g_0 is the paper's server model update. Another move
    g_i has the trust score TS_i = max(cos(g_i, g_0), 0), and what is reduced is the start +
    Σ TS_i · ‖g_0‖ / ‖g_i‖ · g_i / Σ TS_i. As in the paper g_0 is no part of these sums. Where they
    are 0, because nobody agrees, the trusted update alone is the result. Where both factors move,
    the product of a mean is taken to be the mean of the products.

    In the weights that it reports the others share by their scores, and the trusted client, who is
    not judged, has an equal share.
    """
    f = bad_ones("fltrust", byzantine)

    def combine(
        values: Sequence[Value], start: Value, rng: torch.Generator
    ) -> tuple[Value, Tensor]:
        gram = inner_products(values, start, sized_by=values[:1])  # most may be bad
        sizes = gram.diagonal().clamp_min(0).sqrt()
        moved = (sizes > 0) & (sizes[0] > 0)
        scores = torch.where(moved, gram[0] / (sizes * sizes[0]), 0.0).clamp_min(0)
        scores[0] = 0.0
        if not scores.any():
            alone = _equal_weights([0], len(values))
            return values[0], alone
        trust = scores / scores.sum()
        scaled = torch.where(moved, trust * sizes[0] / sizes, 0.0)
        equal = 1 / len(values)
        weights = trust * (1 - equal)
        weights[0] = equal
        return _from_start(values, start, scaled), weights

    return holding("fltrust", f + 2, combine)._replace(trusting=True)


def nnm(inner: Reducer, *, byzantine: int = 0) -> Reducer:
    """Each update becomes the mean of its n − f nearest, itself included, then ``inner``.

    Nearest-neighbour mixing (Allouah et al. 2023, arXiv:2302.01772, Algorithm 2); n ≥ 2 f + 1.
    """
    f = bad_ones("nnm", byzantine)

    def mixing(values: Sequence[Value], start: Value, rng: torch.Generator) -> list[Tensor]:
        count = len(values)
        apart = squared_distances(inner_products(values, start))
        ranked = apart.argsort(dim=1, stable=True)[:, : count - f]
        return [_equal_weights(row.tolist(), count) for row in ranked]

    return _mixing("nnm", inner, max(2 * f + 1, inner.least), mixing)


def bucketing(inner: Reducer, *, size: int = 2) -> Reducer:
    """Means of random buckets of ``size`` updates, then ``inner`` over the buckets.

    Karimireddy et al. 2022 (arXiv:2006.09365, Algorithm 1). The last bucket has what is left. Each
    bad update spoils one bucket, so ``inner`` tolerates as many bad buckets as updates, and needs
    its least number of buckets. Buckets are drawn from the round's random numbers.
    """
    if size < 1:
        raise ConfigError(f"bucketing: size must be at least 1, not {size}")

    def mixing(values: Sequence[Value], start: Value, rng: torch.Generator) -> list[Tensor]:
        order = torch.randperm(len(values), generator=rng).tolist()
        buckets = (order[first : first + size] for first in range(0, len(order), size))
        return [_equal_weights(bucket, len(values)) for bucket in buckets]

    return _mixing("bucketing", inner, size * (inner.least - 1) + 1, mixing)


def clip_product(inner: Reducer, *, norm: float) -> Reducer:
    """Scale each client's move down until what it does to the model is at most ``norm``.

    The Frobenius norm of the change of scaling · lora_B · lora_A over all layers, together with the
    moves of the head. Where one factor moved, the scale is ``norm`` / size; where both did, it is
    found by bisection. ``clip`` bounds the factors themselves, which this does not.
    """
    if not norm > 0:
        raise ConfigError(f"clip_product: norm must be positive, not {norm}")

    def size(value: Value, reference: Value) -> float:
        return math.sqrt(float(inner_products([value], reference, hidden=0.0)))

    def scale_of(value: Value, reference: Value) -> float:
        whole = size(value, reference)
        if whole <= norm:
            return 1.0
        wide = {name: tensor.double() for name, tensor in value.items()}
        first = norm / whole
        if abs(size(moved(wide, reference, first), reference) - norm) <= 1e-9 * norm:
            return first
        low, high = 0.0, 1.0  # both factors moved
        for _ in range(50):
            middle = (low + high) / 2
            fits = size(moved(wide, reference, middle), reference) <= norm
            low, high = (middle, high) if fits else (low, middle)
        return low

    return scaling(inner, scale_of)


def combined(values: Sequence[Value], weights: Tensor) -> Value:
    """Σ w_i value_i in float64, with the names and dtypes of the first value."""
    parts = [(value, float(weight)) for value, weight in zip(values, weights, strict=True)]
    parts = [(value, weight) for value, weight in parts if weight]
    found: dict[str, Tensor] = {}
    for name, like in values[0].items():
        total = torch.zeros(like.shape, dtype=torch.float64)
        for value, weight in parts:
            total = total + weight * value[name].double()
        found[name] = total.to(like.dtype)
    return found


def _from_start(values: Sequence[Value], start: Value, weights: Tensor) -> Value:
    """start + Σ w_i (value_i − start), with the names and dtypes of the first value."""
    left = weights.new_tensor([1 - float(weights.sum())])
    return combined([*values, start], torch.cat([weights, left]))


def _equal_weights(chosen: Sequence[int], count: int) -> Tensor:
    """(count,): 1 / len(chosen) for those that were chosen, 0 for the others."""
    weights = torch.zeros(count, dtype=torch.float64)
    weights[list(chosen)] = 1 / len(chosen)
    return weights


def _scores(apart: Tensor, byzantine: int) -> Tensor:
    """Sum of the squared distances of each to its n − f − 1 nearest others, (n,)."""
    nearest = apart.sort(dim=1).values[:, 1 : len(apart) - byzantine]
    return nearest.sum(dim=1)


def _distances(gram: Tensor, weights: Tensor) -> Tensor:
    """‖x_i − Σ w_j x_j‖ of each, (n,), where the x_j are measured from the start."""
    at = gram @ weights
    return (gram.diagonal() - 2 * at + weights @ at).clamp_min(0).sqrt()


def _weighing(name: str, least: int, weigh: Callable[[Tensor], Tensor]) -> Reducer:
    """The rule Σ w_i x_i with weights from the inner products of what updates do to the model."""

    def combine(
        values: Sequence[Value], start: Value, rng: torch.Generator
    ) -> tuple[Value, Tensor]:
        weights = weigh(inner_products(values, start))
        return combined(values, weights), weights

    return holding(name, least, combine)


def _mixing(
    name: str,
    inner: Reducer,
    least: int,
    mixing: Callable[[Sequence[Value], Value, torch.Generator], list[Tensor]],
) -> Reducer:
    """A step before a rule: ``mixing`` gives the weights (n,) of each mixture that it reduces.

    ConfigError for a rule that needs to know which update is whose.
    """
    if inner.trusting:
        raise ConfigError(
            f"{name} mixes updates, so the rule behind it could not tell the trusted client's: "
            f"leave {name} out"
        )

    def add(memory: Memory, value: Value, reference: Value, weight: float) -> Memory:
        if "mixed" not in memory:
            memory = {"mixed": [], "start": reference, "inner": memory or inner.init()}
        return {**memory, "mixed": [*memory["mixed"], value]}

    def finish(memory: Memory, rng: torch.Generator) -> tuple[Value, Memory]:
        values, start, held = memory["mixed"], memory["start"], memory["inner"]
        if len(values) < least:
            raise ValueError(f"{name} needs {least} updates, but there are {len(values)}")
        rows = mixing(values, start, rng)
        for weights in rows:
            held = inner.add(held, combined(values, weights), start, 1.0)
        reduced, kept = inner.finish(held, rng)
        equal = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
        used = kept.get(CLIENT_WEIGHTS, equal) @ torch.stack(rows)
        return reduced, {**kept, CLIENT_WEIGHTS: used}

    return Reducer(dict, add, finish, least)
