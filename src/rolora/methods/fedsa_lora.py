"""FedSA-LoRA: share lora_A, keep lora_B and the head at the client (Guo et al., ICLR 2025).

lora_A is meant to learn what is general and lora_B what is specific to a client. Every client ends
with a personal adapter and is evaluated with it. arXiv:2410.01463, section 3.
"""

from __future__ import annotations

from rolora.algorithm.method import BOTH, Method


def method() -> Method:
    return Method(
        name="fedsa_lora", trainable=lambda round, step: BOTH, shared=lambda round: frozenset({"A"})
    )
