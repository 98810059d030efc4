"""HetLoRA: clients of different rank, padded with zeros and weighted (Cho et al., EMNLP 2024).

A client of rank r_i receives the server's first r_i directions. Its factors are padded with zeros
and averaged with weights ‖B_iA_i‖_F. With ``gamma`` < 1 clients prune: ``decay`` · ‖B[:,
γr:]‖·‖A[γr:]‖ is added to the loss, and tails that have shrunk are sent as zeros. In the paper such
a client's rank is reduced for good; here the directions may grow back. arXiv:2401.06432, Algorithm
1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Update
from rolora.algorithm.exactness import norm
from rolora.algorithm.factors import padded, tails, truncated
from rolora.algorithm.method import BOTH, Method, Reduce, ServerState
from rolora.errors import ConfigError


def _aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    def weight(update: Update) -> float:
        return norm(update.adapter.delta()) or 1e-30  # equal weights while all products are zero

    mean = reduce(project=lambda view: padded(view.only(BOTH), server.adapter), weight=weight)
    return replace(server, adapter=server.adapter | mean)


def method(*, gamma: float = 1.0, decay: float = 0.01) -> Method:
    """``gamma`` in (0, 1]: the share of a client's rank that is never pruned; 1 prunes nothing."""
    if not 0 < gamma <= 1:
        raise ConfigError(f"hetlora: gamma must be in (0, 1], not {gamma}")
    if decay < 0:
        raise ConfigError(f"hetlora: decay must be at least 0, not {decay}")

    def size(adapter: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([a.norm() * b.norm() for a, b in tails(adapter, gamma)]).sum()

    def upload(received: AdapterState, trained: AdapterState, client: ClientInfo) -> AdapterState:
        if gamma == 1 or size(trained) >= size(received):
            return trained
        sent = AdapterState({name: t.clone() for name, t in trained.items()}, trained.scaling)
        torch._foreach_zero_([tail for pair in tails(sent, gamma) for tail in pair])
        return sent

    return Method(
        name="hetlora",
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        download=lambda server, client: truncated(server.adapter, client.rank),
        penalty=(lambda adapter: decay * size(adapter)) if gamma < 1 else None,
        upload=upload,
        aggregate=_aggregate,
        exact=False,
        heterogeneous_ranks=True,
        sum_only=False,
    )
