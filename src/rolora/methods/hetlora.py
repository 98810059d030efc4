"""HetLoRA: clients of different rank, padded with zeros and weighted (Cho et al., EMNLP 2024).

A client of rank r_i gets the server's first r_i directions. What comes back is padded with zeros,
and each factor is averaged with weights ‖B_iA_i‖_F. With ``gamma`` < 1 clients prune: ``decay`` ·
‖B[:, γr:]‖·‖A[γr:]‖ joins the loss, and a tail that has shrunk is sent as zeros (for the round;
the client's rank stays). arXiv:2401.06432, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rolora.adapter import AdapterState, ClientInfo, Update, layer_of, role_of
from rolora.errors import ConfigError
from rolora.factoring import padded, rank_of, truncated
from rolora.method import BOTH, Method, Reduce, ServerState


def weight(update: Update) -> float:
    return math.sqrt(sum(matrix.norm() ** 2 for matrix in update.adapter.delta().values()))


def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    rank = rank_of(server.adapter)
    mean = reduce(project=lambda view: padded(view.only(BOTH), rank), weight=weight)
    return replace(server, adapter=server.adapter | mean)


def tail(adapter: Mapping[str, Tensor], gamma: float) -> Tensor:
    downs = {layer_of(name): t for name, t in adapter.items() if role_of(name) == "A"}
    norms = []
    for layer, down in downs.items():
        first = int(gamma * len(down))
        norms.append(down[first:].norm() * adapter[f"{layer}.lora_B.weight"][:, first:].norm())
    return torch.stack(norms).sum()


def method(*, gamma: float = 1.0, decay: float = 0.01) -> Method:
    """``gamma`` in (0, 1]: the share of its rank that is never pruned, 1 prunes nothing."""
    if not 0 < gamma <= 1:
        raise ConfigError(f"hetlora: gamma lies in (0, 1], not {gamma}")

    def upload(received: AdapterState, trained: AdapterState, client: ClientInfo) -> AdapterState:
        rank = rank_of(trained)
        pruned = gamma < 1 and tail(trained, gamma) < tail(received, gamma)
        return padded(truncated(trained, int(gamma * rank)), rank) if pruned else trained

    return Method(
        name="hetlora",
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        download=lambda server, client: truncated(server.adapter, client.rank),
        penalty=(lambda adapter: decay * tail(adapter, gamma)) if gamma < 1 else None,
        upload=upload,
        aggregate=aggregate,
        exact=False,
        ranks=True,
        secure=False,
    )
