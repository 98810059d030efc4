"""RoLoRA: alternate which factor is trained and averaged (Chen et al., NeurIPS 2025, Algorithm 1).

Odd rounds train and average lora_B with lora_A frozen, even rounds the other way round. All
clients share the frozen factor, so the mean of the products is the product of the means: every
average is exact, half of the adapter travels, and both factors are learned. arXiv:2502.01755.
"""

from __future__ import annotations

from typing import Literal

from rolora.algorithm.adapter import Roles
from rolora.algorithm.factors import orthonormal_rows
from rolora.algorithm.method import Method, lora_init
from rolora.errors import ConfigError


def method(
    *,
    first: Literal["A", "B"] = "B",
    b_rounds: int = 1,
    alternate: int | None = None,
    orthogonal_a: bool = False,
) -> Method:
    """How the factors take turns; the defaults are the paper's algorithm.

    ``first``: the factor of round 1. With lora_B = 0, lora_A has no gradient, hence "B".
    ``b_rounds``: rounds of lora_B for each round of lora_A (the paper's unbalanced schedules).
    ``alternate``: rounds that take turns; all after them train lora_B, as FFA-LoRA. None: for ever.
    ``orthogonal_a``: start from a lora_A of orthonormal rows, and not from Kaiming's uniform.
    """
    if first not in ("A", "B"):
        raise ConfigError(f"rolora: first is 'A' or 'B', not {first!r}")
    if b_rounds < 1:
        raise ConfigError(f"rolora: b_rounds is at least 1, not {b_rounds}: lora_B starts at 0")
    if alternate is not None and alternate < 1:
        raise ConfigError(f"rolora: alternate is at least 1, not {alternate}; none is ffa_lora")

    def moving(round: int) -> Roles:
        # The server's round number decides, so clients that missed rounds cannot fall out of phase.
        turn = (round - 1) % (b_rounds + 1)
        takes_a = turn == (b_rounds if first == "B" else 0)
        over = alternate is not None and round > alternate
        return frozenset({"A" if takes_a and not over else "B", "head"})

    return Method(
        name="rolora",
        init=orthonormal_rows if orthogonal_a else lora_init,
        trainable=lambda round, step: moving(round),
        shared=moving,
    )
