"""Random generators, each derived from a seed and from what it is for.

A draw depends on (seed, round, client, purpose) and on nothing else, so neither the order of
clients, nor a restart, nor the engine changes a result. Every client knows a run's ``seed``, but
not its ``server_seed``, from which cohorts and the server's draws follow.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed: a hash of ``(seed, *purpose)``."""
    text = repr((int(seed), *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose, such as ``generator(0, "cohort", 3)``."""
    import torch  # here, so that a seed can be derived without it

    return torch.Generator().manual_seed(derived_seed(seed, *purpose))
