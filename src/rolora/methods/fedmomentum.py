"""FedMomentum: average the products, factor them, and keep the remainder (2026).

The mean D = Σ p_i s B_iA_i is split by its singular values. The first r directions become lora_B
and lora_A, which continue training from there; of the others, as many as it takes to hold
``energy`` of ‖D‖² are added to the base as a delta beside the frozen weights. The paper uses a
randomised SVD, this a full one. arXiv:2603.08014.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rolora.algorithm.adapter import layer_of, role_of
from rolora.algorithm.factors import init_with_delta, more_delta, products_and_head, refactored
from rolora.algorithm.method import BOTH, Method, Reduce, ServerState
from rolora.errors import ConfigError


def _beyond(matrix: Tensor, rank: int, energy: float) -> Tensor:
    """The matrix's singular directions after the first ``rank``, up to ``energy`` of its square."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    held = s.square().cumsum(0) / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
    last = len(s) if energy == 1 else int((held < energy).sum()) + 1
    rest: Tensor = (u[:, rank:last] * s[rank:last]) @ vt[rank:last]
    return rest


def method(*, energy: float = 0.9999) -> Method:
    """``energy`` in (0, 1]: the share of ‖D‖² to keep; 1 keeps everything.

    0.9999 in the authors' code. Where the first r directions hold that share, this is FlexLoRA: of
    clients that start from the same factors they nearly always hold 0.99.
    """
    if not 0 < energy <= 1:
        raise ConfigError(f"fedmomentum: energy must be in (0, 1], not {energy}")

    def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        mean, adapter = reduce(project=products_and_head), server.adapter
        rest = {
            name: _beyond(matrix, len(adapter[f"{layer_of(name)}.lora_A.weight"]), energy)
            for name, matrix in mean.items()
            if role_of(name) == "delta"
        }
        return replace(server, adapter=refactored(adapter, mean) | more_delta(server, rest))

    return Method(
        name="fedmomentum",
        init=init_with_delta,
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        aggregate=aggregate,
        exact=False,
        resets_factors=True,
        sum_only=False,
    )
