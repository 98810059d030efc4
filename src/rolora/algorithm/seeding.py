"""Every random draw of a run, derived from what it is for.

A draw depends on (seed, round, client, purpose) and on nothing else, so neither the order of
clients, nor a restart, nor the engine changes a result.
"""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed from ``(seed, *purpose)``; the parts are length-free joined, then hashed."""
    text = repr((int(seed), *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for one purpose, for example ``generator(0, "cohort", 3)``."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))
