"""FedSVD: train lora_B, then refactor so that lora_A is orthonormal (Lee et al., 2025).

Clients train and send only lora_B, so the average is exact as in FFA-LoRA. The server then factors
the same product again, B·A = U S Vᵀ: lora_A becomes Vᵀ and lora_B becomes U S. The rows of lora_A
are orthonormal from round 2 on, but stay in the space of the first ones, because the rows of B·A
are sums of those of A: the adapter reads what FFA-LoRA's would. Round 1 starts from Kaiming
uniform, as in the authors' code. arXiv:2505.12805, section 3.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState
from rolora.algorithm.factors import pair
from rolora.algorithm.method import B_ALONE, Method, Reduce, ServerState, merge_shared


def _turned(adapter: AdapterState) -> AdapterState:
    """The same products, with lora_A = Vᵀ and lora_B = U S; a layer of zeros stays as it is."""
    new: dict[str, Tensor] = {}
    for layer in adapter.layers():
        down, up = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
        if up.any():
            left, small = torch.linalg.qr(up)  # (out, r), (r, r)
            right, other = torch.linalg.qr(down.mT)  # (in, r), (r, r)
            u, s, vt = torch.linalg.svd(small @ other.mT)
            new |= pair(layer, vt @ right.mT, left @ (u[:, : len(s)] * s), len(down))
    return adapter | new


def _aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    mean = merge_shared(server, reduce, rng)
    return replace(mean, adapter=_turned(mean.adapter))


def method() -> Method:
    return Method(
        name="fedsvd",
        trainable=lambda round, step: B_ALONE,
        shared=lambda round: B_ALONE,
        aggregate=_aggregate,
        resets_factors=True,
    )
