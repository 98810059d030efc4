"""HetLoRA: clients of different rank, padded with zeros and weighted (Cho et al., EMNLP 2024).

A client of rank r_i receives the server's first r_i directions. Its factors are padded with zeros
and averaged with weights ‖B_iA_i‖_F. With ``gamma`` < 1 clients prune: ``decay`` · ‖B[:,
γr:]‖·‖A[γr:]‖ is added to the loss, and tails that have shrunk are sent as zeros. In the paper such
a client's rank is reduced for good; here the directions may grow back: one that is zero at all
clients keeps the server's row of lora_A. arXiv:2401.06432, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Update, layer_of, role_of
from rolora.algorithm.exactness import norm
from rolora.algorithm.factors import pair, truncated, without_dead_directions
from rolora.algorithm.method import BOTH, Method, Reduce, ServerState
from rolora.errors import ConfigError


def _tails(adapter: Mapping[str, Tensor], share: float) -> list[tuple[Tensor, Tensor]]:
    """Views of each layer's last rows of lora_A and columns of lora_B: those beyond this share of
    its rank, but never the first."""
    found = []
    for name, lora_a in adapter.items():
        if role_of(name) == "A":
            first = max(1, int(share * len(lora_a)))
            lora_b = adapter[f"{layer_of(name)}.lora_B.weight"]
            found.append((lora_a[first:], lora_b[:, first:]))
    return found


def _aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    def padded(view: AdapterState) -> AdapterState:
        grown: dict[str, Tensor] = {}
        for layer in view.layers():
            down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
            grown |= pair(layer, view[down], view[up], len(server.adapter[down]))
        return view.only(BOTH) | grown

    def weight(update: Update) -> float:
        return norm(update.adapter.delta()) or 1e-30  # equal weights while all products are zero

    new = server.adapter | reduce(project=padded, weight=weight)
    return replace(server, adapter=without_dead_directions(new, server.adapter))


def method(*, gamma: float = 1.0, decay: float = 0.01) -> Method:
    """``gamma`` in (0, 1]: the share of a client's rank that is never pruned; 1 prunes nothing."""
    if not 0 < gamma <= 1:
        raise ConfigError(f"hetlora: gamma must be in (0, 1], not {gamma}")
    if decay < 0:
        raise ConfigError(f"hetlora: decay must be at least 0, not {decay}")

    def size(adapter: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([a.norm() * b.norm() for a, b in _tails(adapter, gamma)]).sum()

    def upload(received: AdapterState, trained: AdapterState, client: ClientInfo) -> AdapterState:
        if gamma == 1 or size(trained) >= size(received):
            return trained
        sent = AdapterState({name: t.clone() for name, t in trained.items()}, trained.scaling)
        torch._foreach_zero_([tail for pair in _tails(sent, gamma) for tail in pair])
        return sent

    return Method(
        name="hetlora",
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        download=truncated,
        penalty=(lambda adapter: decay * size(adapter)) if gamma < 1 else None,
        upload=upload,
        aggregate=_aggregate,
        exact=False,
        heterogeneous_ranks=True,
        sum_only=False,
    )
