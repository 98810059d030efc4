"""One weight per client, applied to that client's run of rows: the products of the client bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rolora.data.examples import moved

Sizes = Sequence[int]


class AddLowRank(torch.autograd.Function):
    """``y`` (n, out) plus B (A x) · scaling: ``lora_a`` (clients, rank, in), ``lora_b`` (clients,
    out, rank), each on its client's segment of the rows.

    Only what the backward pass needs is kept: ``x`` (n, in) where A is trained, A x, which is rank
    wide, where B is. So a round that trains lora_B keeps no activation as wide as the model.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, sizes: Sizes
    ) -> Tensor:
        _, needs_x, needs_a, needs_b, _, _ = ctx.needs_input_grad
        # a GPU multiplies in the dtype of the base, as under autocast; a CPU in the factors'
        dtype = x.dtype if x.device.type == "cuda" else lora_a.dtype
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        down = by_segment(x.to(dtype), a.mT, sizes).mul_(scaling)
        ctx.save_for_backward(
            x if needs_a else None,
            down if needs_b else None,
            a if needs_x else None,
            b if needs_x or needs_a else None,
        )
        ctx.scaling, ctx.sizes = scaling, sizes
        ctx.dtypes = dtype, x.dtype, lora_a.dtype
        return by_segment(down, b.mT, sizes, onto=y)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, down, a, b = ctx.saved_tensors
        dtype, dtype_x, dtype_factor = ctx.dtypes
        gradient = upstream[0].contiguous().to(dtype)
        to_x = to_a = to_b = None
        if b is not None:
            to_down = by_segment(gradient, b, ctx.sizes).mul_(ctx.scaling)
            if a is not None:
                to_x = by_segment(to_down, a, ctx.sizes).to(dtype_x)
            if x is not None:
                to_a = outer_by_segment(to_down, x.to(dtype), ctx.sizes).to(dtype_factor)
        if down is not None:
            to_b = outer_by_segment(gradient, down, ctx.sizes).to(dtype_factor)
        return upstream[0], to_x, to_a, to_b, None, None


def add_low_rank(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, sizes: Sizes
) -> Tensor:
    """``y`` (..., out) plus each client's low-rank part of ``x`` (..., in), client-major rows.

    ``sizes``: rows per client, summing to all. The result is in ``y``'s dtype.
    """
    flat = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    if len(sizes) == 1 and x.dtype == y.dtype == lora_a.dtype:  # torch's own keeps as little
        down = (flat[1] @ lora_a.squeeze(0).mT) * scaling
        return torch.addmm(flat[0], down, lora_b.squeeze(0).mT).view(y.shape)
    result: Tensor = AddLowRank.apply(*flat, lora_a, lora_b, scaling, sizes)  # type: ignore[no-untyped-call]
    return result.view(y.shape)


class SegmentLinear(torch.autograd.Function):
    """``x`` (n, in) times ``weight`` (clients, out, in), each on its client's segment of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: Sizes) -> Tensor:
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


def by_segment(x: Tensor, matrices: Tensor, sizes: Sizes, onto: Tensor | None = None) -> Tensor:
    """``x`` (n, k) times ``matrices`` (clients, k, m), each on its client's rows: (n, m).

    ``onto`` (n, m) is added, and gives the result its dtype.
    """
    if onto is not None and (onto.dtype != x.dtype or grouped(x, matrices)):
        return onto + by_segment(x, matrices, sizes).to(onto.dtype)
    if grouped(x, matrices):
        return functional.grouped_mm(x, matrices, offs=_ends(sizes, x.device))
    # the result is not a view, so that a model may change it in place (Falcon)
    out = x.new_empty(len(x), matrices.shape[2])
    if even(sizes):
        shaped, into = (part.view(len(sizes), sizes[0], -1) for part in (x, out))
        if onto is None:
            torch.bmm(shaped, matrices, out=into)
        else:
            under = onto.view(len(sizes), sizes[0], -1)
            torch.baddbmm(under, shaped, matrices, out=into)
        return out
    split = [*sizes]
    parts = zip(torch.split(x, split), matrices, torch.split(out, split), strict=True)
    if onto is None:
        for rows, matrix, into in parts:
            torch.mm(rows, matrix, out=into)
    else:
        for under, (rows, matrix, into) in zip(torch.split(onto, split), parts, strict=True):
            torch.addmm(under, rows, matrix, out=into)
    return out


def outer_by_segment(left: Tensor, right: Tensor, sizes: Sizes) -> Tensor:
    """Each client's leftᵀ right: (clients, l, r) from ``left`` (n, l) and ``right`` (n, r)."""
    if grouped(left.T, right):
        return functional.grouped_mm(left.T, right, offs=_ends(sizes, left.device))
    if even(sizes):
        lefts, rights = (x.view(len(sizes), sizes[0], -1) for x in (left, right))
        return torch.bmm(lefts.mT, rights)
    out = left.new_empty(len(sizes), left.shape[1], right.shape[1])
    parts = zip(torch.split(left, [*sizes]), torch.split(right, [*sizes]), out, strict=True)
    for rows, others, into in parts:
        torch.mm(rows.T, others, out=into)
    return out


def even(sizes: Sizes) -> bool:
    """Whether to take all segments as one batched product: of one length, and not too short.

    With fewer rows, a CPU's batched product has other bits than each client's by itself.
    """
    return len(sizes) > 1 and sizes[0] >= 16 and len(set(sizes)) == 1


def grouped(left: Tensor, right: Tensor) -> bool:
    """Whether torch can do these products in one call, however long each segment is.

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
    return moved(torch.tensor(sizes), device).cumsum(0).to(torch.int32)
