"""LoRA-FAIR: average both factors, then correct lora_B for the error (Bian et al. 2025).

With D = Σ p_i s B_iA_i, the server adds to the mean B̄ the ΔB that minimises ‖D/s − (B̄ + ΔB) Ā‖² +
λ‖ΔB‖². This is ridge regression, so it is solved in closed form, not iterated as in the paper: ΔB =
(D/s − B̄Ā) Āᵀ (ĀĀᵀ + λI)⁻¹. An error outside the row space of Ā remains. arXiv:2411.14961.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rolora.algorithm.factors import average_and_missed
from rolora.algorithm.method import BOTH, Method, Reduce, ServerState
from rolora.errors import ConfigError


def method(*, ridge: float = 0.01) -> Method:
    """``ridge``: λ, 0.01 in the paper."""
    if ridge < 0:
        raise ConfigError(f"lora_fair: ridge must be at least 0, not {ridge}")

    def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        adapter, missed = average_and_missed(server, reduce)
        corrected = {}
        for layer, scaling in adapter.scaling.items():
            down, up = adapter[f"{layer}.lora_A.weight"], f"{layer}.lora_B.weight"
            residual = missed[f"{layer}.lora_delta.weight"] / scaling
            gram = down @ down.mT + ridge * torch.eye(len(down), dtype=down.dtype)
            correction = (torch.linalg.pinv(gram, hermitian=True) @ down @ residual.mT).mT
            corrected[up] = adapter[up] + correction
        return replace(server, adapter=adapter | corrected)

    return Method(
        name="lora_fair",
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        aggregate=aggregate,
        exact=False,
        sum_only=False,
    )
