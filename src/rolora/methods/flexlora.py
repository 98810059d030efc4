"""FlexLoRA: average the products, hand out their best rank-r factors (Bai et al., NeurIPS 2024).

The server forms D = Σ p_i s B_iA_i, and client j gets the first r_j singular directions of it:
lora_B = U √(S/s), lora_A = √(S/s) Vᵀ. Exact up to what lies beyond the rank. As long as D is zero,
before the first round, the random lora_A itself is handed out. arXiv:2402.11505, Algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rolora.adapter import Roles
from rolora.factoring import factors, products_and_head, rank_of, truncated
from rolora.method import Method, Reduce, ServerState


def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    mean = reduce(project=products_and_head)
    best = factors(mean, rank_of(server.adapter), server.adapter.scaling)
    head = {name: mean[name] for name in mean.keys() & server.adapter.keys()}
    return replace(server, adapter=server.adapter | best | head)


def method() -> Method:
    moving: Roles = frozenset({"A", "B", "head"})
    return Method(
        name="flexlora",
        trainable=lambda round, step: moving,
        shared=lambda round: moving,
        download=lambda server, client: truncated(server.adapter, client.rank),
        aggregate=aggregate,
        exact=False,
        ranks=True,
        rebased=True,
        secure=False,
    )
