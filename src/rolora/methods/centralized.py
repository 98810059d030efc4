"""Centralized: all rows in one place, one adapter, plain LoRA (Hu et al., ICLR 2022).

The upper bound of a comparison: as many optimiser steps in a round as the cohort takes together, on
batches drawn from the rows of all clients. The optimiser is reset each round, as at clients.
Not a federation: nothing travels. arXiv:2106.09685.
"""

from __future__ import annotations

from rolora.algorithm.adapter import ClientInfo
from rolora.algorithm.method import BOTH, Method

POOL = "(all)"  # brackets, because no client's id has them


def _pool(drawn: tuple[ClientInfo, ...], num_examples: int) -> tuple[ClientInfo, ...]:
    """One client with the rows of all clients that takes the steps of those drawn."""
    rank, round = max(client.rank for client in drawn), drawn[0].round
    members = tuple(client.id for client in drawn)
    return (ClientInfo(POOL, num_examples, rank, round, members),)


def method() -> Method:
    return Method(
        name="centralized",
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        cohort=_pool,
    )
