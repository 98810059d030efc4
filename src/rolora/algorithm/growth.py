"""What a round adds to a delta, as two factors, where these are fewer numbers than the matrix.

The mean of the products of N clients of rank r has at most rank N · r. So what it adds to a delta
(out, in) can travel as N · r · (out + in) numbers, as FLoRA and FedEx-LoRA send it, to a client
that holds the delta of the round before. Server and client both add the factors to the old delta,
in arithmetic that rounds only once, so they end with the same bits on any machine.

Tensors: lora_grown_B (out, N · r) and lora_grown_A (N · r, in) of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, layer_of, role_of

Tensors = Mapping[str, Tensor]
# What factors may miss of a change, as a share of it. FedEx-LoRA's is a small difference of float32
# matrices, whose rounding has full rank.
MISSED = 1e-3


def as_factors(
    before: AdapterState, after: AdapterState, rank: int, rng: torch.Generator
) -> tuple[AdapterState, dict[str, Tensor]]:
    """``after`` with its deltas formed from factors of this rank, and the factors by name.

    Layers whose delta did not change, or whose matrix is smaller, have no factors. If the changes
    do not have this rank, as those that a median makes, the adapter stays as it is and there are no
    factors. ``rng`` draws the directions in which the changes are measured; one subspace iteration
    keeps them clear of what was rounded (Halko et al. 2011, Algorithm 4.4).
    """
    growth: dict[str, Tensor] = {}
    formed: dict[str, Tensor] = {}
    for name, wanted in after.only(frozenset({"delta"})).items():
        if not _smaller(wanted, rank) or before.holds(name, wanted):
            continue
        change = wanted.double() - before[name].double()
        probes = torch.randn(change.shape[1], rank, generator=rng, dtype=torch.float64)
        rough = torch.linalg.qr(change @ probes).Q
        basis = torch.linalg.qr(change @ torch.linalg.qr(change.mT @ rough).Q).Q
        up, down = _names(name)
        growth[up] = _on_grid(basis, wanted.dtype)
        growth[down] = _on_grid(basis.mT @ change, wanted.dtype)
        formed[name] = _added(before[name], growth[up], growth[down])
        if (formed[name].double() - wanted.double()).norm() > MISSED * change.norm():
            return after, {}
    return after | formed if formed else after, growth


def in_factors(tensors: AdapterState, growth: Tensors) -> AdapterState:
    """These tensors, with the factors in place of each delta that has some."""
    replaced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        names = _names(name) if role_of(name) == "delta" else ()
        replaced |= {n: growth[n] for n in names} if set(names) & growth.keys() else {name: tensor}
    return AdapterState(replaced, tensors.scaling)


def rank_of(tensors: Tensors) -> int:
    """The rank of the factors among these tensors; 0 without any."""
    ranks = (len(t) for name, t in tensors.items() if name.endswith(".lora_grown_A.weight"))
    return next(ranks, 0)


def layout(like: Tensors, rank: int) -> dict[str, Tensor]:
    """Tensors of the names and shapes in which ``like`` travels with factors of this rank."""
    found = dict(like)
    for name, tensor in like.items():
        if role_of(name) == "delta" and rank and _smaller(tensor, rank):
            up, down = _names(name)
            del found[name]
            found[up] = tensor.new_empty(tensor.shape[0], rank)
            found[down] = tensor.new_empty(rank, tensor.shape[1])
    return found


def grown(held: Tensors, came: Tensors) -> dict[str, Tensor]:
    """What came, with factors added to the deltas that are ``held``; without a delta, left out."""
    found = {name: tensor for name, tensor in came.items() if ".lora_grown_" not in name}
    for name, delta in held.items():
        if role_of(name) == "delta" and set(_names(name)) <= came.keys():
            up, down = _names(name)
            found[name] = _added(delta, came[up], came[down])
    return found


def _names(delta: str) -> tuple[str, str]:
    layer = layer_of(delta)
    return f"{layer}.lora_grown_B.weight", f"{layer}.lora_grown_A.weight"


def _smaller(delta: Tensor, rank: int) -> bool:
    return rank * sum(delta.shape) < delta.numel()


def _added(delta: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """delta + up · down, whose sums are exact in float64 for float32 factors that are on a grid:
    12 and 24 bits a product leave 17 for the number of products."""
    step, wide = _step(up, 12), down.double()
    high = (up.double() / step).round() * step
    whole: Tensor = delta.double() + (high @ wide + (up.double() - high) @ wide)
    return whole.to(delta.dtype)


def _on_grid(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to multiples of one power of two, with all the bits of this dtype for the largest."""
    step = _step(matrix, 24 if dtype == torch.float32 else 53)
    return ((matrix / step).round() * step).to(dtype)


def _step(matrix: Tensor, bits: int) -> float:
    return float(2.0 ** (int(torch.frexp(matrix.double().abs().max()).exponent) - bits))
