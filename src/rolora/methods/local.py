"""Local: every client trains alone, and nothing is sent.

The lower bound of a comparison: what a client reaches without the others. The "local training"
baseline of McMahan et al. 2017 (arXiv:1602.05629), here for LoRA.
"""

from __future__ import annotations

from rolora.algorithm.method import BOTH, Method


def method() -> Method:
    return Method(
        name="local", trainable=lambda round, step: BOTH, shared=lambda round: frozenset()
    )
