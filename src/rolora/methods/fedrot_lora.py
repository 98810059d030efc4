"""FedRot-LoRA: clients rotate their factors toward the server's before averaging (ICML 2026).

B·A = (B R)(Rᵀ A) for any rotation R, so factors of the same product may differ, and their averages
cancel. Each client sends (B_i R, RᵀA_i) with the R in SO(r) that best aligns lora_A (in even
rounds) or lora_B (in odd rounds) with what it received (orthogonal Procrustes, Schönemann 1966),
softened toward the identity; the server averages as FedIT. There is no rotation in round 1. The
authors' published settings rotate fully and allow reflections. arXiv:2602.23638.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo
from rolora.algorithm.method import BOTH, Method
from rolora.errors import ConfigError


def _rotation(matrix: Tensor) -> Tensor:
    """The R in SO(r) with the largest tr(Rᵀ matrix), (r, r)."""
    u, _, vt = torch.linalg.svd(matrix)
    signs = torch.ones_like(matrix[0])
    signs[-1] = torch.linalg.det(u @ vt).sign()
    turned: Tensor = u @ (signs[:, None] * vt)
    return turned


def method(*, softness: float = 0.5) -> Method:
    """``softness`` in [0, 1]: 1 rotates fully, 0 not at all (which is FedIT)."""
    if not 0 <= softness <= 1:
        raise ConfigError(f"fedrot_lora: softness must be in [0, 1], not {softness}")

    def upload(received: AdapterState, trained: AdapterState, client: ClientInfo) -> AdapterState:
        turned: dict[str, Tensor] = {}
        for layer in trained.layers() if client.round > 1 else ():
            down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
            if client.round % 2 == 0:
                whole = _rotation(trained[down] @ received[down].mT)
            else:
                whole = _rotation(trained[up].mT @ received[up])
            soft = _rotation((1 - softness) * torch.eye(len(whole)).to(whole) + softness * whole)
            turned |= {down: soft.mT @ trained[down], up: trained[up] @ soft}
        return trained | turned

    return Method(
        name="fedrot_lora",
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        upload=upload,
        exact=False,
    )
