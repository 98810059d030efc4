"""Tokenised rows kept flat, and batches cut from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Tokenised rows, end to end: row i is ``tokens[offsets[i]:offsets[i+1]]``.

    ``tokens`` int32 (total,); ``offsets`` int64 (rows + 1,); ``types`` uint8 (total,) token types
    of a text pair, or None; ``targets``: per row an int64 label (classification), a float32 number
    (regression) or (labels,) float32 of 0 and 1 (multi_label); or a uint8 per token, 1 where it is
    to be predicted (causal_lm, choice, preference). ``truncated`` counts token sequences that
    were cut to max_length.
    ``groups`` int64 (rows,), in order, says which row of the table each came from, where one may
    have become several: a question one per choice, a chat one per turn. ``answers`` int64
    (groups,) says which row of a question, counted from 0, is right; or, (rows,) and without
    groups, whether a completion is wanted. ``prefix`` (total, hidden) is what enters the lowest
    layer with an adapter, per token, where that has been computed.
    ``seconds`` int64 (rows,): where a row is two token sequences, the second begins at
    ``tokens[seconds[i]]``. ``reference`` (rows, width): the task's outputs before any training,
    where its loss compares with them.
    """

    tokens: Tensor
    offsets: Tensor
    targets: Tensor
    types: Tensor | None = None
    truncated: int = 0
    groups: Tensor | None = None
    answers: Tensor | None = None
    prefix: Tensor | None = None
    seconds: Tensor | None = None
    reference: Tensor | None = None

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens per row, int64 (rows,)."""
        return self.offsets.diff()

    @property
    def sequences(self) -> Examples:
        """The same tokens, with each token sequence as a row of its own."""
        if self.seconds is None:
            return self
        starts = torch.stack([self.offsets[:-1], self.seconds], dim=1).flatten()
        offsets = torch.cat([starts, self.offsets[-1:]])
        return replace(self, offsets=offsets, seconds=None, answers=None, reference=None)

    def made_of(self, rows: Tensor) -> Tensor:
        """The examples that these rows of the table became; both are int64 indices."""
        if self.groups is None:
            return rows
        sizes = self.groups.bincount()
        firsts, sizes = (sizes.cumsum(0) - sizes)[rows], sizes[rows]
        within = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        return firsts.repeat_interleave(sizes) + within


@dataclass(frozen=True)
class Batch:
    """Right-padded token sequences, ``each`` of them (1 or 2) per row, one behind the other.

    ``inputs`` as the model takes them; ``lengths`` (sequences,) int64, on the CPU; ``targets``:
    those of the examples or, where tokens are predicted, the places of those among sequences ×
    length, int64; ``prefix`` its real tokens' (tokens, hidden), sequence after sequence, or None.
    ``answers`` and ``reference`` are the examples' (rows, ...), or None. ``sizes``: rows of each
    client in the bank; empty for one client.
    """

    inputs: dict[str, Tensor]
    lengths: Tensor
    targets: Tensor
    prefix: Tensor | None = None
    each: int = 1
    answers: Tensor | None = None
    reference: Tensor | None = None
    sizes: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on this device; what is cut by them needs the lengths on the CPU."""
        inputs = {name: moved(tensor, device) for name, tensor in self.inputs.items()}
        there: dict[str, Any] = {
            name: moved(value, device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "lengths"
        }
        return replace(self, inputs=inputs, **there)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on this device. The copy to a GPU is queued, so the host does not wait."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def flatten(rows: list[list[int]], dtype: torch.dtype) -> Tensor:
    """Lists end to end in one tensor."""
    return torch.tensor([value for row in rows for value in row], dtype=dtype)


def grouped(examples: Examples, sizes: Sequence[int]) -> Examples:
    """The same examples; ``sizes`` says how many of them each row of the table became."""
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return replace(examples, groups=groups)


def offsets_of(rows: list[list[int]]) -> Tensor:
    """Where each of these rows starts once flattened, and where the last one ends."""
    lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int64)
    return lengths.cumsum(0)


def collate(examples: Examples, rows: Tensor, pad_id: int) -> Batch:
    """The rows with these indices (int64), padded on the right to the longest of them."""
    starts, ends, each = examples.offsets[rows], examples.offsets[rows + 1], 1
    if examples.seconds is not None:
        middles, each = examples.seconds[rows], 2
        starts = torch.stack([starts, middles], dim=1).flatten()
        ends = torch.stack([middles, ends], dim=1).flatten()
    lengths = ends - starts
    columns = torch.arange(int(lengths.max()))
    real = columns < lengths.unsqueeze(1)

    def cut(flat: Tensor, padding: int) -> Tensor:
        if int(lengths.min()) == len(columns):  # stretches, many times as fast as single elements
            return flat.unfold(0, len(columns), 1)[starts]
        places = (starts.unsqueeze(1) + columns).clamp(max=len(flat) - 1)
        return flat[places].masked_fill_(~real, padding)

    inputs = {"input_ids": cut(examples.tokens, pad_id).long(), "attention_mask": real.long()}
    if examples.types is not None:
        inputs["token_type_ids"] = cut(examples.types, 0).long()
    per_token = examples.targets.dtype == torch.uint8
    targets = _places(cut(examples.targets, 0)) if per_token else examples.targets[rows]
    prefix = None
    if examples.prefix is not None:
        prefix = examples.prefix[(starts.unsqueeze(1) + columns)[real]]
    answers = None
    if examples.answers is not None and examples.groups is None:
        answers = examples.answers[rows]
    reference = None if examples.reference is None else examples.reference[rows]
    return Batch(inputs, lengths, targets, prefix, each, answers, reference)


def _places(wanted: Tensor) -> Tensor:
    """Where ``wanted`` (rows, length) is not 0, as row · length + column; a row's first token is
    never predicted. Found here, on the CPU: a GPU's own count would be waited for."""
    wanted[:, 0] = 0
    return wanted.flatten().nonzero().squeeze(1)
