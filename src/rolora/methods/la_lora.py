"""LA-LoRA: alternate the factors between local steps and smooth their gradients (ICLR 2026).

Even local steps train lora_B, odd ones lora_A, so each factor's gradient uses the other's current
value. Each gradient passes a low-pass filter [1, 4, 6, 4, 1]/16, meant to reduce the noise of
differential privacy. The server averages both factors, as FedIT. Here the filter runs along the
layer's width, never across rank or clients. The authors' code starts with lora_A, trains lora_B at
twice the learning rate, and smooths in both dimensions and the head, by a Laplacian in Fourier
space; there a factor moves by lr times its smoothed gradient, and then also by the optimiser's step
on the plain one. arXiv:2602.19926.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rolora.algorithm.adapter import Roles, pieces, role_of
from rolora.algorithm.method import B_ALONE, BOTH, Method

_KERNEL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


def _smoothed(name: str, gradients: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    """Filtered along the width of the layer; (clients, rank, in) or (clients, out, rank)."""
    if role_of(name) == "head":
        return gradients
    rows = pieces(name, gradients)
    flat = torch.nn.functional.pad(rows.flatten(0, 1)[:, None], (2, 2), mode="replicate")
    kernel = _KERNEL.to(flat, non_blocking=True)[None, None]  # else the host waits for a GPU
    filtered = torch.nn.functional.conv1d(flat, kernel).view_as(rows)
    return pieces(name, filtered).contiguous()


def method(*, filter: bool = True) -> Method:
    """``filter``: whether gradients are smoothed."""
    halves: tuple[Roles, Roles] = (B_ALONE, frozenset({"A", "head"}))
    return Method(
        name="la_lora",
        trainable=lambda round, step: halves[step % 2],
        shared=lambda round: BOTH,
        gradient=_smoothed if filter else None,
        exact=False,
    )
