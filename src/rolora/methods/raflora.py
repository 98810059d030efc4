"""raFLoRA: average each piece of the products over the clients that have it (Wu et al., 2026).

The ranks of a round's clients, 0 = ρ_0 < ρ_1 < …, part a product into pieces B[:, ρ_{j-1}:ρ_j] ·
A[ρ_{j-1}:ρ_j]. A client of rank r_i has those with ρ_j ≤ r_i, and each piece is averaged over the
clients that have it:

    D = Σ_j Σ_{i: r_i ≥ ρ_j} p_i s B_i[:, ρ_{j-1}:ρ_j] A_i[ρ_{j-1}:ρ_j] / Σ_{i: r_i ≥ ρ_j} p_i

(out, in). FlexLoRA divides every piece by all p_i, so what only clients of large rank have shrinks
round by round. The rest is as in FlexLoRA: client i receives the first r_i singular directions of
D. With equal ranks it is FlexLoRA. The server holds as many matrices a layer as there are ranks.
The formula is the paper's equation 8, known here from restatements only. Taken from them, not from
the paper: a piece that no client of a round has counts as zero. arXiv:2602.13486,
Algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from rolora.algorithm.adapter import AdapterState, role_of
from rolora.algorithm.factors import refactored
from rolora.algorithm.method import Method, Reduce, ServerState
from rolora.algorithm.reduce import Value
from rolora.methods import flexlora

_SHARES = "shares"


def _aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    bounds = sorted({min(rank, server.adapter.rank) for rank in reduce.ranks})

    def pieces(view: AdapterState) -> Value:
        """Under the name of each delta its pieces (ranks, out, in), zero where the client has none;
        and for each rank whether the client has it."""
        found = dict(view.only(frozenset({"head"})))
        for layer in view.layers():
            down, up = view[f"{layer}.lora_A.weight"], view[f"{layer}.lora_B.weight"]
            parts = [up[:, low:high] @ down[low:high] for low, high in pairwise([0, *bounds])]
            found[f"{layer}.lora_delta.weight"] = view.scaling[layer] * torch.stack(parts)
        has = [float(view.rank >= bound) for bound in bounds]
        return {**found, _SHARES: torch.tensor(has, dtype=torch.float64)}

    mean = dict(reduce(project=pieces))
    shares = mean.pop(_SHARES)
    times = torch.where(shares > 0, 1 / shares, 0.0)[:, None, None]
    whole = {
        name: (times * tensor).sum(0).to(tensor.dtype) if role_of(name) == "delta" else tensor
        for name, tensor in mean.items()
    }
    return replace(server, adapter=refactored(server.adapter, whole))


def method() -> Method:
    return replace(flexlora.method(), name="raflora", aggregate=_aggregate, whole_products=False)
