"""One weight per client, applied to that client's run of rows: the products of the client bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Sizes = list[int] | tuple[int, ...]


class SegmentLinear(torch.autograd.Function):
    """``x`` (n, in) times one weight (out, in) per segment of its rows.

    Only what the backward pass needs is kept: ``x`` where the weight is trained, the weight where
    ``x`` has a gradient. So a round that trains lora_B keeps A x, which is rank wide, and not x.
    Products are in the weight's dtype; ``x`` of a lower one is kept as it is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: Sizes) -> Tensor:
        """``weight`` (clients, out, in); ``sizes`` rows per client, summing to n."""
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.sizes, ctx.dtype = sizes, x.dtype
        return by_segment(x.to(weight.dtype), weight.mT, sizes)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient = upstream[0].contiguous()
        to_x = to_weight = None
        if weight is not None:
            to_x = by_segment(gradient, weight, ctx.sizes).to(ctx.dtype)
        if x is not None:
            to_weight = outer_by_segment(gradient, x.to(gradient.dtype), ctx.sizes)
        return to_x, to_weight, None


def segment_linear(x: Tensor, weight: Tensor, sizes: Sizes) -> Tensor:
    """(..., out): each client's rows of ``x`` (..., in), client-major, times its own weight."""
    flat = x.reshape(-1, x.shape[-1])
    result: Tensor = SegmentLinear.apply(flat, weight, sizes)  # type: ignore[no-untyped-call]
    return result.view(*x.shape[:-1], -1)


def by_segment(x: Tensor, matrices: Tensor, sizes: Sizes) -> Tensor:
    """``x`` (n, k) times ``matrices`` (clients, k, m), each on its client's rows: (n, m)."""
    if grouped(x, matrices):
        return functional.grouped_mm(x, matrices, offs=_ends(sizes, x.device))
    out = x.new_empty(len(x), matrices.shape[2])
    parts = zip(torch.split(x, [*sizes]), matrices, torch.split(out, [*sizes]), strict=True)
    for rows, matrix, into in parts:
        torch.mm(rows, matrix, out=into)
    return out


def outer_by_segment(left: Tensor, right: Tensor, sizes: Sizes) -> Tensor:
    """Each client's leftᵀ right: (clients, l, r) from ``left`` (n, l) and ``right`` (n, r)."""
    if grouped(left.T, right):
        return functional.grouped_mm(left.T, right, offs=_ends(sizes, left.device))
    out = left.new_empty(len(sizes), left.shape[1], right.shape[1])
    parts = zip(torch.split(left, [*sizes]), torch.split(right, [*sizes]), out, strict=True)
    for rows, others, into in parts:
        torch.mm(rows.T, others, out=into)
    return out


def grouped(left: Tensor, right: Tensor) -> bool:
    """Whether torch can do these products in one call, which a GPU is much faster at.

    It asks for bfloat16 and for strides of whole 16 bytes. On a CPU the loop gives the bits that
    each client would have by itself.
    """
    if left.device.type != "cuda" or left.dtype != torch.bfloat16:
        return False
    whole = all(
        stride == 1 or stride * tensor.element_size() % 16 == 0
        for tensor in (left, right)
        for stride in tensor.stride()
    )
    return whole and hasattr(functional, "grouped_mm")


def _ends(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)
