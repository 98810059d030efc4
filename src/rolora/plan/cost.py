"""What one step of a bank costs: products, what is kept for the backward pass, memory at its peak.

A step is run on a base that has shapes only (``rolora.plan.meta_model``), so its cost is counted
operation by operation as it will be, and takes neither the memory nor the time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from rolora.algorithm.adapter import AdapterState, Roles, role_of
from rolora.data.examples import Batch
from rolora.model.bank import row_keys
from rolora.plan.meta_model import Outline
from rolora.tasks.registry import Task


@dataclass(frozen=True)
class StepCost:
    """Of one optimiser step of all clients in a bank.

    ``flops``: two for each multiplication and addition of a matrix product, forward and backward;
    attention in full, masked or not. ``activations``: bytes kept from the forward pass for the
    backward pass. ``peak``: bytes in use at most at one time, activations and gradients included,
    the model, the adapters and the optimiser's state left out.
    """

    flops: int
    activations: int
    peak: int


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is active, the products made and the bytes of new storages as they live."""

    def __init__(self, standing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in standing}
        self.flops = 0
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.logsumexp:  # makes a copy of its input meanwhile
            self.peak = max(self.peak, self.now + args[0].nbytes)
        if formula := FLOPS.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._gone, key)
            self.now += self._alive[key]
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)


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
            bank.load([start] * len(sizes), base.device)
            for name, leaf in bank.leaves.items():
                leaf.requires_grad_(role_of(name) in roles)
            model = base.model
            with Counter([*model.parameters(), *model.buffers(), *bank.leaves.values()]) as count:
                each, _ = task.loss(model, given)
                kept = count.now
                each.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        bank.unload()
    return StepCost(count.flops, kept, count.peak)


def _forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    counted: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return counted


def _backward(gradient: Tensor, *inputs: Tensor, **__: Any) -> int:
    query, key, value = (tensor.shape for tensor in inputs[:3])
    counted: int = sdpa_backward_flop_count(gradient.shape, query, key, value)  # type: ignore[no-untyped-call]
    return counted


# torch knows the attention of a GPU and not that of a CPU
FLOPS: Mapping[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
