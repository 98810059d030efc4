"""Centralized: all rows in one place, one adapter, plain LoRA (Hu et al., ICLR 2022).

The upper bound of a comparison: as many optimiser steps in a round as the cohort takes together,
on batches drawn from everybody's rows. Not a federation. arXiv:2106.09685.
"""

from __future__ import annotations

from rolora.algorithm.adapter import Roles
from rolora.algorithm.method import Method


def method() -> Method:
    trained: Roles = frozenset({"A", "B", "head"})
    return Method(
        name="centralized",
        trainable=lambda round, step: trained,
        shared=lambda round: trained,
        pooled=True,
    )
