"""From factors to whole matrices and back: for methods whose server multiplies out.

A matrix (out, in) goes under the name of the layer's delta, so that what does not fit into factors
can be added to it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rolora.adapter import AdapterState, Specs, layer_of, role_of
from rolora.method import ServerState, lora_init
from rolora.reduce import Value


def products(view: AdapterState) -> dict[str, Tensor]:
    """scaling · lora_B · core · lora_A (out, in) of each layer, under the name of its delta."""
    return {
        f"{layer}.lora_delta.weight": view.scaling[layer]
        * (view.up(layer) @ view[f"{layer}.lora_A.weight"])
        for layer in view.layers()
    }


def products_and_head(view: AdapterState) -> Value:
    """What most of these methods reduce: each layer's product, and the task head as it is."""
    return {**products(view), **view.only(frozenset({"head"}))}


def factors(matrices: Value, rank: int, scaling: Mapping[str, float]) -> dict[str, Tensor]:
    """The best s · lora_B · lora_A of this rank (Eckart and Young 1936).

    lora_A = √(S/s) Vᵀ (rank, in) and lora_B = U √(S/s) (out, rank) of matrices U S Vᵀ.
    Beyond a matrix's own rank factors are zeros. Names that are no delta's are left out.
    """
    found: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        if role_of(name) == "delta":
            layer = layer_of(name)
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
            root = (s[:rank] / scaling[layer]).sqrt()
            lora_a, lora_b = vt[:rank] * root[:, None], u[:, :rank] * root
            missing = rank - len(root)
            found[f"{layer}.lora_A.weight"] = torch.nn.functional.pad(lora_a, (0, 0, 0, missing))
            found[f"{layer}.lora_B.weight"] = torch.nn.functional.pad(lora_b, (0, missing))
    return found


def truncated(adapter: AdapterState, rank: int) -> AdapterState:
    """The first ``rank`` rows of each lora_A and columns of each lora_B; itself if that is all."""
    cut = {
        name: tensor[:rank] if role_of(name) == "A" else tensor[:, :rank].contiguous()
        for name, tensor in adapter.items()
        if (role_of(name) == "A" and tensor.shape[0] > rank)
        or (role_of(name) == "B" and tensor.shape[1] > rank)
    }
    return adapter | cut if cut else adapter


def padded(adapter: AdapterState, rank: int) -> AdapterState:
    """Each lora_A and lora_B filled up with zeros to this rank; the inverse of ``truncated``."""
    grown = {}
    for name, tensor in adapter.items():
        if role_of(name) == "A" and tensor.shape[0] < rank:
            grown[name] = torch.nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))
        elif role_of(name) == "B" and tensor.shape[1] < rank:
            grown[name] = torch.nn.functional.pad(tensor, (0, rank - tensor.shape[1]))
    return adapter | grown if grown else adapter


def orthonormal_rows(specs: Specs, rng: torch.Generator) -> AdapterState:
    """``lora_init`` with the rows of each lora_A made orthonormal (QR of normal numbers)."""
    adapter = lora_init(specs, rng)
    return adapter | {
        name: torch.linalg.qr(torch.randn(tensor.mT.shape, generator=rng)).Q.mT.contiguous()
        for name, tensor in adapter.only(frozenset({"A"})).items()
    }


def init_with_delta(specs: Specs, rng: torch.Generator) -> AdapterState:
    """``lora_init`` with a delta (out, in) of zeros for each layer."""
    adapter = lora_init(specs, rng)
    shapes = {spec.name: spec.shape for spec in specs.tensors}
    zeros = {
        f"{layer}.lora_delta.weight": torch.zeros(
            shapes[f"{layer}.lora_B.weight"][0], shapes[f"{layer}.lora_A.weight"][1]
        )
        for layer in specs.scaling
    }
    return adapter | zeros


def more_delta(server: ServerState, matrices: Value) -> dict[str, Tensor]:
    """The server's deltas with these matrices added to them."""
    return {
        name: server.adapter[name] + matrix
        for name, matrix in matrices.items()
        if role_of(name) == "delta"
    }


def rank_of(adapter: AdapterState) -> int:
    """The largest rank of its layers."""
    return max(t.shape[0] for name, t in adapter.items() if role_of(name) == "A")


def portable(adapter: AdapterState) -> AdapterState:
    """The same changes of the base weights in lora_A and lora_B alone, as PEFT knows them.

    A core is multiplied into lora_B. A delta is factored, in float64, and joined to them: the rank
    grows, to at most that of a whole matrix.
    """
    if not adapter.only(frozenset({"core", "delta"})):
        return adapter
    plain = {**adapter.only(frozenset({"A", "B", "head"}))}
    for layer in adapter.layers():
        down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        plain[up] = adapter.up(layer)
        if (delta := adapter.get(f"{layer}.lora_delta.weight")) is not None and delta.any():
            scaling = adapter.scaling[layer]
            whole = {f"{layer}.lora_delta.weight": delta.double()}
            rank = int(torch.linalg.matrix_rank(delta.double()))
            if rank + adapter[down].shape[0] > min(delta.shape):
                whole = {
                    name: matrix + scaling * plain[up].double() @ plain[down].double()
                    for name, matrix in whole.items()
                }
                parts = factors(whole, min(delta.shape), {layer: scaling})
            else:
                parts = factors(whole, rank, {layer: scaling})
                parts[up] = torch.cat([plain[up].double(), parts[up]], dim=1)
                parts[down] = torch.cat([plain[down].double(), parts[down]])
            plain |= {name: part.to(delta.dtype) for name, part in parts.items()}
    return AdapterState(plain, adapter.scaling)
