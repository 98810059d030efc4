"""FedIT, FedAvg of LoRA: train both factors, average each on its own (Zhang et al., ICASSP 2024).

The mean of the products is not the product of the means, so the server's adapter is not the average
of what the clients learned; ``aggregation_error`` shows by how much. arXiv:2305.05644.
"""

from __future__ import annotations

from rolora.algorithm import factors
from rolora.algorithm.method import BOTH, Method


def method(*, scaled: bool = False) -> Method:
    """``scaled``: precondition each factor's gradient by the other factor (arXiv:2402.02347)."""
    return Method(
        name="fedit",
        trainable=lambda round, step: BOTH,
        shared=lambda round: BOTH,
        gradient=factors.scaled if scaled else None,
        exact=False,
    )
