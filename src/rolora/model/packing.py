"""Right-padded rows as tokens end to end, and attention on them.

Linear layers, norms and activations treat every token alike, so they run on packed tokens as they
are. Only attention needs to know where rows begin and end: it pads rows of similar length itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rolora.data.examples import moved


@dataclass(frozen=True)
class Group:
    """``rows`` that attend side by side, padded to ``width``.

    ``real`` (rows, 1, 1, width) is False on padding.
    """

    rows: int
    width: int
    real: Tensor


@dataclass(frozen=True)
class Packing:
    """Right-padded rows as tokens end to end.

    ``row`` and ``position`` (tokens,) int64 say which token is which, ``places`` where it lies
    among rows × ``width``. Attention pads them otherwise: its ``groups`` are rows of like length,
    one group's rows · width places after another's. There, ``spot`` (tokens,) is where a token
    lies, ``source`` the token at every place (any token on padding), ``padding`` the others.
    ``ranked`` (rows,) are the rows in the order of the groups, ``firsts`` (rows,) each row's first
    token. ``first``: attention is wanted for these tokens alone.
    """

    rows: int
    width: int
    row: Tensor
    position: Tensor
    places: Tensor
    groups: tuple[Group, ...]
    spot: Tensor
    source: Tensor
    padding: Tensor
    ranked: Tensor
    firsts: Tensor
    first: bool = False

    @property
    def dense(self) -> bool:
        """Whether all rows have the same length, so that packing moves nothing."""
        return len(self.row) == self.rows * self.width

    def to(self, device: torch.device) -> Packing:
        """The same packing on this device."""
        names = ("row", "position", "places", "spot", "source", "padding", "ranked", "firsts")
        there: dict[str, Any] = {name: moved(getattr(self, name), device) for name in names}
        there["groups"] = tuple(replace(g, real=moved(g.real, device)) for g in self.groups)
        return replace(self, **there)


def pack(lengths: Tensor) -> Packing:
    """The packing of right-padded rows of these lengths (int64), all at least 1."""
    rows, width = len(lengths), int(lengths.max())
    if int(lengths.min()) == width:  # nothing moves, and one group has all rows
        every = torch.arange(rows * width, device=lengths.device)
        group = _group(lengths)
        row, position = every // width, every % width
        none, firsts = every[:0], every[::width]
        return Packing(
            rows, width, row, position, every, (group,), every, every, none, every[:rows], firsts
        )
    row = torch.arange(rows, device=lengths.device).repeat_interleave(lengths)
    position = torch.arange(len(row), device=lengths.device) - (lengths.cumsum(0) - lengths)[row]
    # rows of a group differ at most by a factor of two, so attention wastes little on padding
    size = torch.frexp(((lengths - 1) / 16).float()).exponent.clamp(min=0)
    groups, ranked, starts, total = [], [], torch.zeros_like(lengths), 0
    for value in torch.unique(size):
        chosen = (size == value).nonzero().squeeze(1)
        groups.append(_group(lengths[chosen]))
        ranked.append(chosen)
        starts[chosen] = total + torch.arange(len(chosen), device=row.device) * groups[-1].width
        total += len(chosen) * groups[-1].width
    spot = starts[row] + position
    source = row.new_zeros(total).index_copy_(0, spot, torch.arange(len(row), device=row.device))
    padding = torch.ones_like(source, dtype=torch.bool).index_fill_(0, spot, False).nonzero()
    return Packing(
        rows,
        width,
        row,
        position,
        places=row * width + position,
        groups=tuple(groups),
        spot=spot,
        source=source,
        padding=padding.squeeze(1),
        ranked=torch.cat(ranked),
        firsts=lengths.cumsum(0) - lengths,
    )


def _group(lengths: Tensor) -> Group:
    width = int(lengths.max())
    real = torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)
    return Group(len(lengths), width, real[:, None, None, :])


class _Taken(torch.autograd.Function):
    """``x`` at ``there``; its gradient is the upstream one at ``back``, but 0 at ``zero``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, zero: Tensor | None) -> Tensor:
        ctx.back, ctx.zero = back, zero
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = upstream[0].index_select(0, ctx.back)
        if ctx.zero is not None:
            gradient.index_fill_(0, ctx.zero, 0)
        return gradient, None, None, None


def spread(x: Tensor, packing: Packing) -> Tensor:
    """Packed tokens (tokens, ...) padded for attention: (places, ...).

    Padding is a copy of some token: it must not reach any result, and gets no gradient.
    """
    return _Taken.apply(x, packing.source, packing.spot, None)  # type: ignore[no-untyped-call, no-any-return]


def collect(padded: Tensor, packing: Packing) -> Tensor:
    """The real tokens of what attention padded, packed: (tokens, ...)."""
    return _Taken.apply(padded, packing.spot, packing.source, packing.padding)  # type: ignore[no-untyped-call, no-any-return]


class Place(torch.autograd.Function):
    """``x`` (n, ...) at ``places``, which names none twice, and ``rest`` elsewhere: (size, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int, rest: float = 0.0) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_full((size, *x.shape[1:]), rest).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return upstream[0].index_select(0, places), None, None, None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, with its sums in float32 where that is faster.

    On a CPU its backward pass takes several times as long in bfloat16, whatever the lengths;
    a pass without one does not (benchmarks/benches/bfloat16.py).
    """
    given = query.dtype
    if (
        given == torch.bfloat16
        and query.device.type == "cpu"
        and any(x.requires_grad for x in (query, key, value))
    ):
        query, key, value = query.float(), key.float(), value.float()
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
    out, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return out.to(given), None


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; with ``packing``, on tokens of many rows end to end.

    query (1, heads, tokens, head_dim), key and value alike; the result (1, tokens, heads, ...),
    zero where the packing does not want it.
    """
    if packing is None:
        return _attention(module, query, key, value, mask=attention_mask, **kwargs)
    if packing.dense:
        shape = (packing.rows, packing.width)
        views = [x.view(x.shape[1], *shape, -1).transpose(0, 1) for x in (query, key, value)]
        if packing.first:
            views[0] = views[0][:, :, :1]
        out, _ = _attention(module, *views, mask=None, **kwargs)
        flat = out.flatten(0, 1)
        if packing.first:
            flat = Place.apply(flat, packing.firsts, len(packing.row))  # type: ignore[no-untyped-call]
        return flat.unsqueeze(0), None
    sizes = [group.rows * group.width for group in packing.groups]
    tokens = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    firsts = packing.firsts[packing.ranked]
    if packing.first:
        wanted = tokens[0].index_select(0, firsts)
        queries = torch.split(wanted, [group.rows for group in packing.groups])
    else:
        queries = torch.split(spread(tokens[0], packing), sizes)
    padded = (torch.split(spread(x, packing), sizes) for x in tokens[1:])
    outputs = []
    for group, *parts in zip(packing.groups, queries, *padded, strict=True):
        shaped = [x.unflatten(0, (group.rows, -1)).transpose(1, 2) for x in parts]
        causal = getattr(module, "is_causal", True)  # then no real token sees the padding behind it
        mask = None if causal else group.real
        out, _ = _attention(module, *shaped, mask=mask, **kwargs)
        outputs.append(out.flatten(0, 1))
    whole = torch.cat(outputs)
    if packing.first:
        return Place.apply(whole, firsts, len(packing.row)).unsqueeze(0), None  # type: ignore[no-untyped-call]
    return collect(whole, packing).unsqueeze(0), None
