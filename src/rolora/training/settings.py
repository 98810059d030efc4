"""How a client trains in a round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rolora.algorithm.adapter import Roles


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains in a round: ``steps`` optimiser steps, or ``epochs`` over its shard.

    The optimiser is reset each round; for the roles in ``kept`` it continues from its state
    of the client's last round, and where they are not trained in this one, their gradients update
    it. ``max_grad_norm`` clips each client's gradient. lora_B learns at lr × ``b_lr_ratio``
    (LoRA+, Hayou et al. 2024), the task head at lr × ``head_lr_ratio``, everything else at lr.
    """

    steps: int | None = 5
    epochs: int | None = None
    batch_size: int = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    max_grad_norm: float | None = None
    b_lr_ratio: float = 1.0
    head_lr_ratio: float = 1.0
    kept: Roles = frozenset()

    def num_steps(self, num_examples: int) -> int:
        """Optimiser steps in a round for a client with this many rows."""
        if self.epochs is not None:
            return self.epochs * math.ceil(num_examples / self.batch_size)
        return self.steps or 0
