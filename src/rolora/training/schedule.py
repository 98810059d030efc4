"""The learning rate of each round."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    round: int, *, lr: float, rounds: int, schedule: Schedule = "constant", warmup_rounds: int = 0
) -> float:
    """The learning rate of a round: linear warm-up, then constant or falling toward 0."""
    if round <= warmup_rounds:
        return lr * round / (warmup_rounds + 1)
    left = 1 - (round - 1 - warmup_rounds) / max(1, rounds - warmup_rounds)
    if schedule == "linear":
        return lr * left
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * (1 - left))) / 2
    return lr
