"""RAVAN: several heads, each a small core between frozen factors (Raje et al., NeurIPS 2025).

ΔW = s · Σ_h g_h B_h H_h A_h. The cores H_h (r, r) and gains g_h are trained; lora_B and lora_A,
with heads · r orthonormal directions, are frozen and the same everywhere. A client sends g_h H_h,
whose mean is exact, and its gains return to 1. With ``lora.rank`` directions in ``heads`` heads, a
layer sends rank²/heads numbers and a gain of 1 per head. The paper's clients with little memory,
which train only some heads, are not implemented. arXiv:2506.05568.
"""

from __future__ import annotations

import torch

from rolora.algorithm.adapter import AdapterState, ClientInfo, Specs
from rolora.algorithm.factors import first_core, orthonormal, orthonormal_rows
from rolora.algorithm.method import CORE, Method
from rolora.errors import ConfigError


def _upload(received: AdapterState, trained: AdapterState, client: ClientInfo) -> AdapterState:
    cores = {}
    for layer in trained.layers():
        core, gain = f"{layer}.lora_core.weight", f"{layer}.lora_gain.weight"
        cores[core] = trained[core] * trained[gain][:, None, None]
        cores[gain] = torch.ones_like(trained[gain])
    return trained | cores


def method(*, heads: int = 2) -> Method:
    """``heads``: the number of heads; it must divide the rank."""

    def init(specs: Specs, rng: torch.Generator) -> AdapterState:
        adapter = orthonormal_rows(specs, rng)
        new = {}
        for layer in adapter.layers():
            up = f"{layer}.lora_B.weight"
            out, rank = adapter[up].shape
            if heads < 1 or rank % heads:
                raise ConfigError(f"ravan: heads = {heads} does not divide lora.rank = {rank}")
            new[up] = orthonormal(up, rank, out, rng).mT.contiguous()
            new[f"{layer}.lora_core.weight"] = first_core(specs, layer, heads, rng)
            new[f"{layer}.lora_gain.weight"] = torch.ones(heads)
        return adapter | new

    return Method(
        name="ravan",
        init=init,
        trainable=lambda round, step: CORE,
        shared=lambda round: CORE,
        upload=_upload,
    )
