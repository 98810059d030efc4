"""Fed-ALoRA: share lora_B, keep lora_A and the head at the client (Ban and Ji, 2025).

The mirror image of FedSA-LoRA: B ← Σ p_i B_i (out, rank), while A_i (rank, in) stays at home. The
paper finds that the lora_A of clients resemble each other because they start from the same numbers,
and that lora_B holds what has been learned, so lora_B is the one to share. Every client ends with a
personal adapter and is evaluated with it: its own lora_A and the mean lora_B. The server's lora_A
is the first one, so its product is no client's. In the paper's experiments there is no head; in the
authors' code lora_A restarts from the first one in each round, and clients are evaluated before
the average. The paper's clients of different ranks, whose lora_B is a product of two matrices, are
not implemented. arXiv:2509.25414.
"""

from __future__ import annotations

from dataclasses import replace

from rolora.algorithm.method import Method
from rolora.methods import fedsa_lora


def method() -> Method:
    return replace(fedsa_lora.method(), name="fed_alora", shared=lambda round: frozenset({"B"}))
