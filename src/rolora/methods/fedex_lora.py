"""FedEx-LoRA: FedAvg of both factors plus what it misses (Singhal et al., ACL 2025).

The factors are averaged as in FedIT. What that misses, the residual Σ p_i s B_iA_i − s·B̄Ā, is
added to the base as a delta beside the frozen weights, so the average is exact. Besides the
factors, the last residual travels down as factors of rank N · r, to a client that took part in the
round before; to others, or where it is smaller, the sum of all residuals, a full matrix per layer.
arXiv:2410.09432, section 4.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rolora.algorithm.factors import average_and_missed, init_with_delta, more_delta
from rolora.algorithm.method import BOTH, Method, Reduce, ServerState


def _aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    adapter, missed = average_and_missed(server, reduce)
    return replace(server, adapter=adapter | more_delta(server, missed))


def method() -> Method:
    return Method(
        name="fedex_lora",
        init=init_with_delta,
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        aggregate=_aggregate,
        sum_only=False,
    )
