"""The cost of one training step: matrix products, activations kept, memory at the peak.

The step runs on a base that has shapes only (``rolora.plan.meta_model``), so every operation is the
one that a real run makes, and takes neither its memory nor its time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rolora.algorithm.adapter import AdapterState, Roles
from rolora.data.examples import Batch
from rolora.model.bank import row_keys
from rolora.plan.meta_model import Outline
from rolora.tasks.registry import Task


@dataclass(frozen=True)
class StepCost:
    """One optimiser step of all clients in a bank.

    ``flops``: two per multiply-add of a matrix product, forward and backward; attention in full,
    masked or not. ``activations``: bytes kept for the backward pass. ``peak``: the most bytes in
    use at one time, including activations and gradients but not the model, the adapters or the
    optimiser's state.
    """

    flops: int
    activations: int
    peak: int


class ByteCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of new storages while they live; ``existing`` tensors do not count."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in existing}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.logsumexp:  # copies its input meanwhile
            self.peak = max(self.peak, self.now + args[0].nbytes)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._remove, key)
            self.now += self._alive[key]
            self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key)


Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


# torch's counter knows the attention of a GPU only
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def step_cost(
    outline: Outline,
    task: Task,
    batch: Batch,
    sizes: Sequence[int],
    start: AdapterState,
    roles: Roles,
) -> StepCost:
    """The cost of a step in which clients with ``sizes`` rows of ``batch`` train ``roles``."""
    base, bank = outline.base, outline.base.bank
    keys = row_keys([0] * len(sizes), 0, sizes) if bank.dropout else None
    try:
        with base.running(batch, sizes, keys) as given, outline.mode:
            bank.load([start] * len(sizes))
            bank.train(roles)
            # two passes, because the counter of products keeps gradients alive
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as products:
                task.loss(base.model, given)[0].sum().backward()  # type: ignore[no-untyped-call]
            for leaf in bank.leaves.values():
                leaf.grad = None
            existing = [*base.model.parameters(), *base.model.buffers(), *bank.leaves.values()]
            with ByteCounter(existing) as bytes:
                each, _ = task.loss(base.model, given)
                kept = bytes.now
                each.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        bank.unload()
    return StepCost(products.get_total_flops(), kept, bytes.peak)
