"""From factors to full matrices and back, for methods whose server forms products.

A full matrix (out, in) has the name of the layer's delta, so that what does not fit into factors
can be added to the delta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from rolora.algorithm.adapter import (
    AdapterState,
    ClientInfo,
    Specs,
    layer_of,
    partner_of,
    pieces,
    role_of,
)
from rolora.algorithm.method import BOTH, Reduce, ServerState, lora_init
from rolora.algorithm.patches import turn_of, turned
from rolora.algorithm.reduce import Value
from rolora.errors import ConfigError


def products(view: AdapterState) -> dict[str, Tensor]:
    """scaling · lora_B · core · lora_A (out, in) of each layer, under the name of its delta."""
    return {
        f"{layer}.lora_delta.weight": view.scaling[layer]
        * (view.up(layer) @ view[f"{layer}.lora_A.weight"])
        for layer in view.layers()
    }


def products_and_head(view: AdapterState) -> Value:
    """What most of these methods reduce: each layer's product, and the task head."""
    return {**products(view), **view.only(frozenset({"head"}))}


def average_and_missed(
    server: ServerState, reduce: Reduce
) -> tuple[AdapterState, dict[str, Tensor]]:
    """The server's adapter with each factor averaged, and what its products miss of the mean ones.

    What is missed (out, in) is by the name of the layer's delta.
    """
    mean = reduce(project=lambda view: {**view.only(BOTH), **products(view)})
    adapter = server.adapter | {name: mean[name] for name in server.adapter.only(BOTH)}
    return adapter, {name: mean[name] - product for name, product in products(adapter).items()}


def factors(matrices: Value, like: AdapterState) -> dict[str, Tensor]:
    """The best s · lora_B · lora_A (Eckart and Young 1936) of the ranks and scalings of ``like``.

    lora_A = √(S/s) Vᵀ (rank, in) and lora_B = U √(S/s) (out, rank) of matrices U S Vᵀ. Beyond the
    rank of a matrix, as ``torch.linalg.matrix_rank`` counts it, its factors are zeros. Tensors that
    are not deltas are passed on.
    """
    found: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        if role_of(name) == "delta":
            layer = layer_of(name)
            rank = len(like[f"{layer}.lora_A.weight"])
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
            s = torch.where(s > s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps, s, 0.0)
            root = (s[:rank] / like.scaling[layer]).sqrt()
            found |= pair(layer, root[:, None] * vt[:rank], u[:, :rank] * root, rank)
        else:
            found[name] = matrix
    return found


def without_dead_directions(new: AdapterState, before: AdapterState) -> AdapterState:
    """``new``, with the row of lora_A from ``before`` for each direction that is zero in both
    factors: neither would ever have a gradient. The product stays as it is.
    """
    revived: dict[str, Tensor] = {}
    for layer in new.layers():
        down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        dead = (new[down] == 0).all(dim=1) & (new[up] == 0).all(dim=0)
        revived[down] = torch.where(dead[:, None], before[down], new[down])
    return new | revived


def refactored(before: AdapterState, matrices: Value) -> AdapterState:
    """``before`` with the best factors of these matrices, and the other tensors among them.

    No direction is zero in both factors: see ``without_dead_directions``.
    """
    return without_dead_directions(before | factors(matrices, before), before)


def pair(layer: str, lora_a: Tensor, lora_b: Tensor, rank: int) -> dict[str, Tensor]:
    """A layer's two factors by name, padded with zeros to this rank."""
    return {
        f"{layer}.lora_A.weight": pad(lora_a, (0, 0, 0, rank - lora_a.shape[0])),
        f"{layer}.lora_B.weight": pad(lora_b, (0, rank - lora_b.shape[1])),
    }


def truncated(server: ServerState, client: ClientInfo) -> AdapterState:
    """As many rows of each lora_A and columns of each lora_B as the client's rank, as views."""
    return server.adapter | {
        name: pieces(name, pieces(name, tensor)[: client.rank])
        for name, tensor in server.adapter.only(frozenset({"A", "B"})).items()
        if len(pieces(name, tensor)) > client.rank
    }


def orthonormal(name: str, rank: int, width: int, rng: torch.Generator) -> Tensor:
    """(rank, width) with orthonormal rows, by QR of normal numbers; float32.

    Raises ConfigError if ``rank`` is larger than ``width``.
    """
    if rank > width:
        raise ConfigError(
            f"lora.rank = {rank} is more than the {width} orthonormal directions that "
            f"{layer_of(name)} has: lower it, or leave the layer out of lora.target_modules"
        )
    columns: Tensor = torch.linalg.qr(torch.randn(width, rank, generator=rng)).Q
    return columns.mT.contiguous()


def orthonormal_rows(specs: Specs, rng: torch.Generator) -> AdapterState:
    """``lora_init``, with orthonormal rows in each lora_A."""
    adapter = lora_init(specs, rng)
    downs = adapter.only(frozenset({"A"}))
    return adapter | {n: orthonormal(n, len(t), t.shape[1], rng) for n, t in downs.items()}


def turn(server: ServerState, frozen: Literal["A", "B"], length: float) -> ServerState:
    """The same products from pairs whose factor ``frozen`` is orthogonal: the rows of lora_A, or
    the columns of lora_B, have this length.

    With the polar decomposition of the factor, lora_A = M · Q with orthogonal rows in Q and M
    (rank, rank) symmetric, lora_B · lora_A = (lora_B · M) · Q; for lora_B the other way round. A
    layer whose factor is zero stays as it is. Of a rank above the layer's width, Q's columns are
    orthogonal instead. The other factor's turn M is in the state's patches.
    """
    new: dict[str, Tensor] = {}
    turns: dict[str, Tensor] = {}
    for layer in server.adapter.layers():
        name = f"{layer}.lora_{frozen}.weight"
        other = partner_of(name)
        factor = server.adapter[name]
        if factor.any():
            u, s, vt = torch.linalg.svd(pieces(name, factor).double(), full_matrices=False)
            by = turns[turn_of(other)] = ((u * s) @ u.mT / length).to(factor.dtype)
            new[name] = pieces(name, length * (u @ vt)).to(factor.dtype).contiguous()
            new[other] = turned(other, server.adapter[other], by)
    return replace(server, adapter=server.adapter | new, patches={**server.patches, **turns})


DAMPING = 1e-2  # as PEFT's create_riemannian_optimizer


def scaled(name: str, gradients: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    """A factor's gradient, preconditioned by the other factor as it is: (BᵀB + δ)⁻¹ g for lora_A,
    g (AAᵀ + δ)⁻¹ for lora_B (ScaledGD: Tong et al. 2021; for LoRA: Zhang & Pilanci,
    arXiv:2402.02347), with δ = ``DAMPING``; other gradients as they are.

    ``gradients`` (clients, *shape) of the tensor ``name``; ``leaves`` as ``Method.gradient`` says.
    """
    if role_of(name) not in ("A", "B"):
        return gradients
    other = partner_of(name)
    partner = pieces(other, leaves[other].detach())  # (clients, rank, width)
    gram = partner @ partner.mT
    gram.diagonal(dim1=1, dim2=2).add_(DAMPING)
    # positive definite; torch's own check of that would have the host wait for a GPU
    solved = torch.linalg.solve_ex(gram, pieces(name, gradients)).result
    return pieces(name, solved).contiguous()


def first_core(specs: Specs, layer: str, heads: int, rng: torch.Generator) -> Tensor:
    """The core (heads, r, r) of a layer between orthonormal factors of rank heads · r; float32.

    Zeros. If ``specs.b_std`` asks for a random lora_B, the core is normal instead, and so large
    that the first product has the Frobenius norm that lora_B · lora_A of ``lora_init`` would have.
    """
    shapes = {spec.name: spec.shape for spec in specs.tensors}
    out, rank = shapes[f"{layer}.lora_B.weight"]
    shape = heads, rank // heads, rank // heads
    if not specs.b_std:
        return torch.zeros(shape)
    return torch.randn(shape, generator=rng) * specs.b_std * math.sqrt(out * heads / (3 * rank))


def zero_deltas(specs: Specs) -> dict[str, Tensor]:
    """A delta (out, in) of zeros for each layer, by tensor name; float32."""
    shapes = {spec.name: spec.shape for spec in specs.tensors}
    return {
        f"{layer}.lora_delta.weight": torch.zeros(
            shapes[f"{layer}.lora_B.weight"][0], shapes[f"{layer}.lora_A.weight"][1]
        )
        for layer in specs.scaling
    }


def init_with_delta(specs: Specs, rng: torch.Generator) -> AdapterState:
    """``lora_init``, with a delta (out, in) of zeros for each layer."""
    return lora_init(specs, rng) | zero_deltas(specs)


def more_delta(server: ServerState, matrices: Value) -> dict[str, Tensor]:
    """The server's deltas plus these matrices; tensors that are not deltas are passed on."""
    return {
        name: server.adapter[name] + tensor if role_of(name) == "delta" else tensor
        for name, tensor in matrices.items()
    }


def to_peft(adapter: AdapterState) -> AdapterState:
    """The same changes of the base weights as plain lora_A and lora_B, which PEFT can load.

    A core is multiplied into lora_B. A delta is factored, in float64, and its factors are appended,
    so the rank grows, at most to that of a full matrix.
    """
    if not adapter.only(frozenset({"core", "delta"})):
        return adapter
    plain = {**adapter.only(frozenset({"A", "B", "head"}))}
    for layer in adapter.layers():
        plain[f"{layer}.lora_B.weight"] = adapter.up(layer)
        delta = adapter.get(f"{layer}.lora_delta.weight")
        if delta is not None and delta.any():
            plain |= _with_delta(layer, AdapterState(plain, adapter.scaling), delta)
    return AdapterState(plain, adapter.scaling)


def _with_delta(layer: str, plain: AdapterState, delta: Tensor) -> Mapping[str, Tensor]:
    """The layer's two factors with the delta included."""
    name, scaling = f"{layer}.lora_delta.weight", plain.scaling
    down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    own = AdapterState({n: plain[n].double() for n in (down, up)}, scaling)
    rank, whole = int(torch.linalg.matrix_rank(delta.double())), min(delta.shape)
    if rank + len(own[down]) > whole:
        full = delta.double() + products(own)[name]
        found = factors({name: full}, AdapterState({down: torch.empty(whole, 0)}, scaling))
    else:
        kept = factors({name: delta.double()}, AdapterState({down: torch.empty(rank, 0)}, scaling))
        found = {
            down: torch.cat([own[down], kept[down]]),
            up: torch.cat([own[up], kept[up]], dim=1),
        }
    return {name: part.to(delta.dtype) for name, part in found.items()}
