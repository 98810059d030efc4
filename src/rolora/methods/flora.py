"""FLoRA: stack the clients' factors, which is their exact sum (Wang et al., NeurIPS 2024).

The stacked product s·[p_1B_1 … p_NB_N]·[A_1; …; A_N] = Σ p_i s B_iA_i is added to the base as a
delta beside the frozen weights, and every round starts from a new random lora_A and lora_B = 0. So
the average is exact and ranks may differ, but the factors keep nothing that was learned. All
clients of a round share that lora_A; in the paper each draws its own. A client that took part in
the round before receives the stack of the last round, of rank N · r; others, or all where it is
smaller, receive the sum of all stacks, one matrix per layer. arXiv:2409.05976.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rolora.algorithm.adapter import role_of
from rolora.algorithm.factors import init_with_delta, more_delta, products_and_head
from rolora.algorithm.method import Method, Reduce, ServerState, kaiming
from rolora.methods import flexlora


def _aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    mean = reduce(project=products_and_head)
    fresh = {
        name: kaiming(tensor.shape, rng).to(tensor.dtype)
        if role_of(name) == "A"
        else torch.zeros_like(tensor)
        for name, tensor in server.adapter.only(frozenset({"A", "B"})).items()
    }
    return replace(server, adapter=server.adapter | more_delta(server, mean) | fresh)


def method() -> Method:
    return replace(
        flexlora.method(), name="flora", init=init_with_delta, aggregate=_aggregate, exact=True
    )
