"""FlexLoRA: average the products, send down their best rank-r factors (Bai et al., NeurIPS 2024).

The server forms D = Σ p_i s B_iA_i, and client j receives its first r_j singular directions: lora_B
= U √(S/s), lora_A = √(S/s) Vᵀ. The average is exact but for what the rank cannot hold. Where D has
less than rank r, lora_B is zero and lora_A keeps the rows that it had, since both would otherwise
stay zero; before the first round these are all rows of the random lora_A. arXiv:2402.11505,
Algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rolora.algorithm.factors import products_and_head, refactored, truncated
from rolora.algorithm.method import BOTH, Method, Reduce, ServerState


def _aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    return replace(server, adapter=refactored(server.adapter, reduce(project=products_and_head)))


def method() -> Method:
    return Method(
        name="flexlora",
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        download=truncated,
        aggregate=_aggregate,
        exact=False,
        heterogeneous_ranks=True,
        whole_products=True,
        resets_factors=True,
        sum_only=False,
    )
