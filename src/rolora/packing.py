"""Right-padded rows as tokens end to end, and attention on them.

Linear layers, norms and activations treat every token alike, so they run on packed tokens as they
are. Attention alone sees where rows begin and end: it pads rows of like length for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass(frozen=True)
class Group:
    """Rows that attend side by side, padded to ``width``.

    ``tokens`` are their places among all packed tokens and ``places`` those among rows × width;
    ``source`` (rows · width,) is the token at every place, any token on padding; ``real`` (rows, 1,
    1, width) is False on padding.
    """

    tokens: Tensor
    places: Tensor
    source: Tensor
    rows: int
    width: int
    real: Tensor


@dataclass(frozen=True)
class Packing:
    """Right-padded rows as tokens end to end.

    ``row`` and ``position`` (tokens,) int64 say which token is which, ``places`` where it lies
    among rows × ``width``. ``groups`` are rows of like length.
    """

    rows: int
    width: int
    row: Tensor
    position: Tensor
    places: Tensor
    groups: tuple[Group, ...]

    @property
    def dense(self) -> bool:
        """Whether all rows have the same length, so that packing moves nothing."""
        return len(self.row) == self.rows * self.width


def pack(lengths: Tensor) -> Packing:
    """The packing of right-padded rows of these lengths (int64), all at least 1."""
    rows, width = len(lengths), int(lengths.max())
    row = torch.arange(rows, device=lengths.device).repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(len(row), device=lengths.device) - starts[row]
    # rows of a group differ at most by a factor of two, so attention wastes little on padding
    size = torch.frexp(((lengths - 1) / 16).float()).exponent.clamp(min=0)
    groups = tuple(_group(size == value, lengths, row, position) for value in torch.unique(size))
    return Packing(rows, width, row, position, row * width + position, groups)


def _group(chosen: Tensor, lengths: Tensor, row: Tensor, position: Tensor) -> Group:
    rows, width = int(chosen.sum()), int(lengths[chosen].max())
    tokens = chosen[row].nonzero().squeeze(1)
    number = chosen.long().cumsum(0) - 1  # of each row among the chosen
    places = number[row[tokens]] * width + position[tokens]
    source = tokens.new_zeros(rows * width).index_copy_(0, places, tokens)
    real = torch.arange(width, device=lengths.device) < lengths[chosen].unsqueeze(1)
    return Group(tokens, places, source, rows, width, real[:, None, None, :])


class Spread(torch.autograd.Function):
    """Packed tokens (tokens, ...) as padded rows, (rows · width, ...) per group.

    Padding is a copy of some token: it must not reach any result, and gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Sequence[Group]) -> tuple[Tensor, ...]:
        ctx.groups, ctx.count = groups, len(x)
        return tuple(x.index_select(0, group.source) for group in groups)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return _collected(upstream, ctx.groups, ctx.count), None


class Collect(torch.autograd.Function):
    """The real tokens of padded rows, (rows · width, ...) per group, packed: (tokens, ...)."""

    @staticmethod
    def forward(ctx: Any, groups: Sequence[Group], count: int, *padded: Tensor) -> Tensor:
        ctx.groups = groups
        return _collected(padded, groups, count)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None, *tuple[Tensor, ...]]:
        (gradient,) = upstream
        rows = ctx.groups
        parts = (gradient if len(rows) == 1 else gradient.index_select(0, g.tokens) for g in rows)
        sizes = (g.rows * g.width for g in rows)
        return None, None, *map(_placed, parts, (g.places for g in rows), sizes)


def _collected(padded: Sequence[Tensor], groups: Sequence[Group], count: int) -> Tensor:
    if len(groups) == 1:
        return padded[0].index_select(0, groups[0].places)
    out = padded[0].new_empty(count, *padded[0].shape[1:])
    for group, rows in zip(groups, padded, strict=True):
        out.index_copy_(0, group.tokens, rows.index_select(0, group.places))
    return out


def _placed(x: Tensor, places: Tensor, size: int) -> Tensor:
    return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)


class Place(torch.autograd.Function):
    """Zeros (size, ...) with ``x`` (n, ...) at ``places``, which names none twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return _placed(x, places, size)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return upstream[0].index_select(0, places), None, None


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

    query (1, heads, tokens, head_dim), key and value alike; the result (1, tokens, heads, ...).
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if packing.dense:
        shape = (packing.rows, packing.width)
        views = (x.view(x.shape[1], *shape, -1).transpose(0, 1) for x in (query, key, value))
        out, _ = sdpa_attention_forward(module, *views, None, **kwargs)
        return out.flatten(0, 1).unsqueeze(0), None
    groups, count = packing.groups, query.shape[2]
    spread = (Spread.apply(x.squeeze(0).transpose(0, 1), groups) for x in (query, key, value))  # type: ignore[no-untyped-call]
    outputs = []
    for group, *padded in zip(groups, *spread, strict=True):
        shaped = [x.unflatten(0, (group.rows, group.width)).transpose(1, 2) for x in padded]
        causal = getattr(module, "is_causal", True)  # then no real token sees the padding behind it
        mask = None if causal else group.real
        out, _ = sdpa_attention_forward(module, *shaped, mask, **kwargs)
        outputs.append(out.flatten(0, 1))
    packed: Tensor = Collect.apply(groups, count, *outputs)  # type: ignore[no-untyped-call]
    return packed.unsqueeze(0), None
