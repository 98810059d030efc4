"""Fed-SB: train an r × r core between two frozen factors (Singhal et al., 2025).

ΔW = s · B R A, where lora_B and lora_A are the first singular vectors of the loss's gradient at
the start (LoRA-SB), fixed and the same at every client. Only R is trained and averaged, which is
exact, and r² numbers per layer travel whatever its width; before the first round every client sends
its gradient, a full matrix per layer. Here R starts at 0, so the first model is the base model, or
at random numbers if the model learns nothing from 0; in the paper R starts at the singular values
over s, and the signs of the gradient are factored, like the first step of Adam. arXiv:2502.15436.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Specs
from rolora.algorithm.factors import first_core
from rolora.algorithm.method import CORE, Method, lora_init


def _init(specs: Specs, rng: torch.Generator) -> AdapterState:
    adapter = lora_init(specs, rng)
    new: dict[str, Tensor] = {}
    for layer in adapter.layers():
        down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        rank = len(adapter[down])
        u, _, vt = torch.linalg.svd(specs.gradient[layer], full_matrices=False)
        new |= {down: vt[:rank].contiguous(), up: u[:, :rank].contiguous()}
        new[f"{layer}.lora_core.weight"] = first_core(specs, layer, 1, rng)
    return adapter | new


def method() -> Method:
    return Method(
        name="fed_sb",
        init=_init,
        needs_gradient=True,
        trainable=lambda round, step: CORE,
        shared=lambda round: CORE,
    )
