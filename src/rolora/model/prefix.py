"""The layers below the adapters, computed once per token for a whole run and kept on disk.

What leaves these frozen layers is the same in every round.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rolora.data.examples import Examples, collate
from rolora.model.base import Base
from rolora.model.kept import Kept, kept

TOKENS_AT_ONCE = 4096


def below_adapters(base: Base, examples: Examples, folder: Path) -> Kept | None:
    """Where the prefix of these rows belongs.

    None if the lowest layer carries an adapter, or the model cannot run packed.
    """
    stack, examples = base.stack, examples.sequences
    if stack is None or stack.lowest == 0 or not stack.fits(examples.lengths):
        return None
    width = int(base.model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    rows, shape = (examples.tokens, examples.offsets, examples.types), (len(examples.tokens), width)
    return kept(folder, base, f"below layer {stack.lowest}", rows, shape, base.dtype)


def kept_below(base: Base, examples: Examples, folder: Path) -> tuple[Examples, str]:
    """The rows with their prefix, where there is one to keep; and one line on it for the user.

    A folder that cannot be used is named there, and the rows come back without.
    """
    prefix = below_adapters(base, examples, folder)
    if prefix is None or base.stack is None:
        return examples, ""
    try:
        hidden = prefix.made(partial(_fill, base, examples))
    except OSError as error:
        reason = error.strerror or str(error)
        return examples, f"frozen layers run in every step: {folder} cannot be used ({reason})"
    layers, size = base.stack.lowest, prefix.num_bytes / 1e6
    note = f"outputs of the layers below the adapters ({layers}): {size:.1f} MB in {folder}"
    return replace(examples, prefix=hidden), note


def _fill(base: Base, examples: Examples, into: Tensor) -> None:
    """Run all rows, short ones first, some thousand tokens at a time."""
    assert base.stack is not None
    examples = examples.sequences
    order = examples.lengths.argsort(stable=True)
    turn = (examples.lengths[order].cumsum(0) - 1) // TOKENS_AT_ONCE
    for rows in torch.split(order, torch.unique(turn, return_counts=True)[1].tolist()):
        batch = collate(examples, rows, base.tokenizer.pad_token_id).to(base.device)
        inputs = {name: x for name, x in batch.inputs.items() if name != "attention_mask"}
        hidden = base.stack.below(base.model, inputs, batch.lengths).cpu()
        parts = torch.split(hidden, batch.lengths.tolist())
        for start, part in zip(examples.offsets[rows].tolist(), parts, strict=True):
            into[start : start + len(part)] = part
