"""FedEx-LoRA: FedAvg of both factors plus what it misses (Singhal et al., ACL 2025).

The factors are averaged as in FedIT, and the residual Σ p_i s B_iA_i − s·B̄Ā, which that loses, is
added to the base, beside the frozen weights: the average is exact. arXiv:2410.09432, section 4.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rolora.adapter import AdapterState, role_of
from rolora.factoring import init_with_delta, more_delta, products
from rolora.method import BOTH, Method, Reduce, ServerState
from rolora.reduce import Value


def factors_and_products(view: AdapterState) -> Value:
    return {**view.only(BOTH), **products(view)}


def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    mean = reduce(project=factors_and_products)
    moved = {name: tensor for name, tensor in mean.items() if role_of(name) != "delta"}
    adapter = server.adapter | moved
    missed = {name: mean[name] - product for name, product in products(adapter).items()}
    return replace(server, adapter=adapter | more_delta(server, missed))


def method() -> Method:
    return Method(
        name="fedex_lora",
        init=init_with_delta,
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        aggregate=aggregate,
        secure=False,
    )
