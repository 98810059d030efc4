"""Patches: numbers from which a client makes a tensor itself, where these are fewer than its own.

A client that holds the adapter of the round before can be sent a patch in place of a tensor:

- *What a delta grew by.* The mean of the products of N clients of rank r has at most rank N · r. So
  what it adds to a delta (out, in) can travel as N · r · (out + in) numbers, as FLoRA and
  FedEx-LoRA send it: lora_grown_B (out, N · r) and lora_grown_A (N · r, in).
- *How a factor was turned.* A server that writes the same product with another pair of factors
  changes the one that nobody trained, too: to T · lora_A or lora_B · T, where T (r, r) is
  lora_turn_A or lora_turn_B.

Server and client apply a patch in the same way, in arithmetic that rounds each number once, or in
one written order, so they end with the same bits on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, layer_of, pieces, role_of

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
        up, down = _patches(name)
        growth[up] = _on_grid(basis, wanted.dtype)
        growth[down] = _on_grid(basis.mT @ change, wanted.dtype)
        formed[name] = _added(before[name], growth[up], growth[down])
        if (formed[name].double() - wanted.double()).norm() > MISSED * change.norm():
            return after, {}
    return after | formed if formed else after, growth


def turned(name: str, factor: Tensor, turn: Tensor) -> Tensor:
    """T · lora_A or lora_B · T of a symmetric turn T (r, r), in the dtype of the factor.

    Products of float32 numbers are exact in float64, and are summed in order of the rank.
    """
    rows, total = pieces(name, factor).double(), 0.0
    for k, row in enumerate(rows):
        total = total + turn[:, k, None] * row
    return pieces(name, torch.as_tensor(total)).to(factor.dtype).contiguous()


def patched(tensors: AdapterState, patches: Tensors) -> AdapterState:
    """These tensors, with the patch in place of each that has one."""
    replaced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = {patch: patches[patch] for patch in _patches(name) if patch in patches}
        replaced |= own or {name: tensor}
    return AdapterState(replaced, tensors.scaling)


def rank_of(tensors: Tensors) -> int:
    """The rank of what deltas grew by among these tensors; 0 without any."""
    ranks = (len(t) for name, t in tensors.items() if name.endswith(".lora_grown_A.weight"))
    return next(ranks, 0)


def layout(like: Tensors, rank: int) -> dict[str, Tensor]:
    """Tensors of the names and shapes that ``like`` may travel as, if deltas grew by this rank."""
    found = dict(like)
    for name, tensor in like.items():
        if role_of(name) == "delta" and rank and _smaller(tensor, rank):
            up, down = _patches(name)
            del found[name]
            found[up] = tensor.new_empty(tensor.shape[0], rank)
            found[down] = tensor.new_empty(rank, tensor.shape[1])
        elif role_of(name) in ("A", "B"):
            rank_here = len(pieces(name, tensor))
            found[turn_of(name)] = tensor.new_empty(rank_here, rank_here)
    return found


def applied(held: Tensors, came: Tensors) -> dict[str, Tensor]:
    """What came, with each patch applied to the tensor that is ``held``; without one, left out."""
    found = {name: tensor for name, tensor in came.items() if not name.endswith(_SUFFIXES)}
    for name, tensor in held.items():
        parts = [came[patch] for patch in _patches(name) if patch in came]
        if parts:
            found[name] = (
                _added(tensor, *parts) if role_of(name) == "delta" else turned(name, tensor, *parts)
            )
    return found


_SUFFIXES = tuple(f".lora_{kind}_{factor}.weight" for kind in ("grown", "turn") for factor in "AB")


def turn_of(name: str) -> str:
    """The name of the turn (rank, rank) of the factor with this name."""
    return name.replace(".lora_", ".lora_turn_")


def _patches(name: str) -> tuple[str, ...]:
    """The names of the tensors that may travel in place of this one."""
    role = role_of(name)
    if role == "delta":
        layer = layer_of(name)
        return f"{layer}.lora_grown_B.weight", f"{layer}.lora_grown_A.weight"
    return (turn_of(name),) if role in ("A", "B") else ()


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
