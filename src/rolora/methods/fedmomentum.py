"""FedMomentum: average the products, factor them, and keep what is left over (2026).

The mean D = Σ p_i s B_iA_i is split by its singular values: the first r directions become lora_B
and lora_A, which go on from where training was; of the rest, those that are needed to hold
``energy`` of ‖D‖² are added to the base, beside the frozen weights. arXiv:2603.08014.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rolora.adapter import Roles, role_of
from rolora.errors import ConfigError
from rolora.factoring import factors, init_with_delta, more_delta, products_and_head, rank_of
from rolora.method import Method, Reduce, ServerState


def beyond(matrix: Tensor, rank: int, energy: float) -> Tensor:
    """The matrix's singular directions after the first ``rank``, up to ``energy`` of its square."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    held = s.square().cumsum(0) / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
    last = len(s) if energy == 1 else int((held < energy).sum()) + 1
    rest: Tensor = (u[:, rank:last] * s[rank:last]) @ vt[rank:last]
    return rest


def method(*, energy: float = 0.99) -> Method:
    """``energy`` in (0, 1]: the share of ‖D‖² that is kept; 1 keeps all."""
    if not 0 < energy <= 1:
        raise ConfigError(f"fedmomentum: energy lies in (0, 1], not {energy}")

    def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        mean, rank = reduce(project=products_and_head), rank_of(server.adapter)
        parts = {name: t for name, t in mean.items() if role_of(name) == "delta"}
        rest = {name: beyond(matrix, rank, energy) for name, matrix in parts.items()}
        kept = factors(mean, rank, server.adapter.scaling)
        head = {name: mean[name] for name in mean.keys() - parts.keys()}
        return replace(server, adapter=server.adapter | more_delta(server, rest) | kept | head)

    moving: Roles = frozenset({"A", "B", "head"})
    return Method(
        name="fedmomentum",
        init=init_with_delta,
        trainable=lambda round, step: moving,
        shared=lambda round: moving,
        aggregate=aggregate,
        exact=False,
        rebased=True,
        secure=False,
    )
