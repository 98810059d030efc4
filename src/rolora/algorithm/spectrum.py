"""How large the factors of each layer are, and how many directions their product has."""

from __future__ import annotations

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Roles
from rolora.algorithm.low_rank import small_product


def effective_rank(left: Tensor, right: Tensor) -> float | None:
    """exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ, of the singular values σ of left · right.

    ``left`` (out, r), ``right`` (r, in). This is the effective rank of Roy & Vetterli 2007: 1 for
    one direction, r for r equal ones; None for a product of zero.
    """
    values = torch.linalg.svdvals(small_product(left, right))
    if not (total := values.sum()):
        return None
    return float(torch.special.entr(values / total).sum().exp())


def layer_measures(adapter: AdapterState, unknown: Roles) -> dict[str, dict[str, float | None]]:
    """What is measured of a server's factors -> layer -> value; only what is defined.

    "norm_A" and "norm_B" are Frobenius norms. "effective_rank" is that of lora_B · core · lora_A;
    None for a layer that has a delta beside its factors, which then hold only a part of the change,
    or whose product is 0. ``unknown``: roles that clients keep to themselves, of which the server
    has no trained tensors.
    """
    layers = adapter.layers()
    found: dict[str, dict[str, float | None]] = {
        f"norm_{role}": {
            layer: float(adapter[f"{layer}.lora_{role}.weight"].double().norm()) for layer in layers
        }
        for role in ("A", "B")
        if role not in unknown
    }
    if not unknown & {"A", "B", "core"}:
        found["effective_rank"] = {
            layer: None
            if f"{layer}.lora_delta.weight" in adapter
            else effective_rank(adapter.up(layer), adapter[f"{layer}.lora_A.weight"])
            for layer in layers
        }
    return {what: own for what, own in found.items() if any(v is not None for v in own.values())}
