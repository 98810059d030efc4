"""FFA-LoRA: freeze lora_A, train and average lora_B (Sun et al., ICLR 2024).

The frozen factor is the same everywhere, so the average is exact and half of the adapter travels;
but the adapter reads only r random directions of its input, those of the frozen lora_A.
arXiv:2403.12313, section 4.
"""

from __future__ import annotations

from rolora.algorithm import factors
from rolora.algorithm.method import B_ALONE, Method


def method(*, scaled: bool = False) -> Method:
    """``scaled``: precondition each factor's gradient by the other factor (arXiv:2402.02347)."""
    return Method(
        name="ffa_lora",
        trainable=lambda round, step: B_ALONE,
        shared=lambda round: B_ALONE,
        gradient=factors.scaled if scaled else None,
    )
