"""What the model gave before any training, with which the loss of a preference compares."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, tensor_hash
from rolora.data.examples import Examples
from rolora.model.base import Base
from rolora.model.kept import kept
from rolora.tasks.registry import Task
from rolora.training.local import in_batches, in_order, outputs_of

# gives the items one by one, and may show how far it is with what is said
Tracked = Callable[[Sequence[Any], str], Iterable[Any]]


def untold(items: Sequence[Any], what: str) -> Iterable[Any]:
    """The items; nothing is shown."""
    return items


def references(
    base: Base,
    task: Task,
    start: AdapterState | None,
    folder: Path | None = None,
    tracked: Tracked = untold,
) -> Callable[[Examples], Examples]:
    """A function that gives examples their ``reference``: the task's outputs on the base with the
    adapter ``start``, or with none.

    It depends on nothing that trains, so the same rows are run once, however often they come and
    whatever the bank holds meanwhile. Those of more than one batch are kept in ``folder``, for
    other runs. An outline has no values: there it is zero.
    """
    known: dict[Path, Tensor] = {}
    adapter = sorted((name, tensor_hash(tensor)) for name, tensor in (start or {}).items())
    scaling = sorted(start.scaling.items()) if start is not None else []

    def computed(examples: Examples) -> Tensor:
        batches, what = in_batches(examples), f"running {len(examples)} rows through the model"
        shown = tracked(batches, f"{what} before training, once") if len(batches) > 1 else batches
        with base.holding(start):
            found = outputs_of(base, task, replace(examples, reference=None), shown)
        return in_order(examples, found)

    def compared(examples: Examples) -> Examples:
        if base.outline:
            return replace(examples, reference=torch.zeros(len(examples), 4))
        sequences = examples.sequences
        rows = (sequences.tokens, sequences.offsets, sequences.targets)
        what = f"preference {adapter} {scaling}"
        place = kept(folder or Path(), base, what, rows, (len(examples), 4), torch.float32)
        if place.file not in known:
            found = None
            if folder is not None and len(in_batches(examples)) > 1:
                with contextlib.suppress(OSError):  # a folder that cannot be used
                    found = place.made(lambda into: _copy(computed(examples), into))
            known[place.file] = computed(examples) if found is None else found
        return replace(examples, reference=known[place.file])

    return compared


def _copy(found: Tensor, into: Tensor) -> None:
    into.copy_(found)
