"""RoLoRA: alternate which factor is trained and averaged (Chen et al., NeurIPS 2025, Algorithm 1).

Odd rounds train and average lora_B with lora_A frozen, even rounds the other way round. All
clients share the frozen factor, so the mean of the products is the product of the means: every
average is exact, half of the adapter travels, and both factors are learned. arXiv:2502.01755.
"""

from __future__ import annotations

from typing import Literal

from rolora.adapter import Roles
from rolora.errors import ConfigError
from rolora.method import Method


def method(*, first: Literal["A", "B"] = "B") -> Method:
    """``first``: the factor of round 1. With lora_B = 0, lora_A has no gradient, hence "B"."""
    if first not in ("A", "B"):
        raise ConfigError(f"rolora: first is 'A' or 'B', not {first!r}")
    second: Literal["A", "B"] = "A" if first == "B" else "B"

    def moving(round: int) -> Roles:
        # The server's round number decides, so clients that missed rounds cannot fall out of phase.
        return frozenset({first if round % 2 == 1 else second, "head"})

    return Method(name="rolora", trainable=lambda round, step: moving(round), shared=moving)
