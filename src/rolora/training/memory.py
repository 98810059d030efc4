"""How much memory a pass through the bank takes, and so how many clients train at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rolora.algorithm.adapter import AdapterState, Roles
from rolora.algorithm.method import Method
from rolora.data.examples import Examples, collate
from rolora.model.base import Base
from rolora.tasks.registry import Task

# above this a pass hardly gets faster per token: benchmarks/benches/client_step.py
TOKENS_IN_A_PASS = {"cpu": 1024, "cuda": 16384, "mps": 4096}
Wanted = int | Literal["auto"]  # as train.bank
SHARE = 0.5  # of the free memory that activations may take
PROCESS = 400_000_000  # bytes of Python and its libraries: benchmarks/benches/workers.py


@dataclass(frozen=True)
class BankPlan:
    """How many clients train at once: about ``tokens`` tokens in a pass.

    ``activations`` maps what is trained at a time (see ``phases``) to the bytes that a pass keeps
    for its backward pass.
    """

    clients: int
    tokens: int
    activations: Mapping[str, int]

    def __str__(self) -> str:
        kept = " and ".join(f"{n / 1e6:,.0f} MB to train {w}" for w, n in self.activations.items())
        size = f"{self.tokens:,} tokens a step, whose activations take {kept}"
        return f"{self.clients} clients at once: {size}"


def phases(method: Method, rounds: int, kept: Roles = frozenset()) -> dict[str, Roles]:
    """The sets of roles that get gradients at a time over these rounds, by name.

    ``kept``: roles that get them in every step.
    """
    found = {}
    for round in range(1, rounds + 1):
        for step in (0, 1):  # methods that alternate within a round do so every step
            roles = method.trainable(round, step) | kept
            found["+".join(sorted(roles - {"head"})) or "the head"] = roles
    return found


def plan_bank(
    base: Base,
    task: Task,
    examples: Examples,
    start: AdapterState,
    phases: Mapping[str, Roles],
    batch_size: int,
    clients: int,
    wanted: Wanted = "auto",
) -> BankPlan:
    """``wanted`` clients, or as many as keep the processor busy, but no more than fit in memory.

    ``phases``: what is trained at a time, by name. Measured on one batch of rows of about the mean
    length.
    """
    tokens = max(1, round(float(examples.lengths.double().mean()) * batch_size))
    each = {
        name: activation_bytes(base, task, examples, start, roles, batch_size)
        for name, roles in phases.items()
    }
    device, cards = base.device.type, len(base.stack.devices) if base.stack else 1
    free = cards * free_bytes(device)
    size = bank_size(device, tokens, max(each.values()), free, clients, wanted)
    return BankPlan(size, size * tokens, {name: size * kept for name, kept in each.items()})


def bank_size(
    device: str, tokens: int, kept: int, free: int, clients: int, wanted: Wanted = "auto"
) -> int:
    """Clients in a pass, if each has ``tokens`` tokens and keeps ``kept`` of the ``free`` bytes.

    "auto" makes the passes of a round an even number if they are more than one and the clients
    divide so: then two workers have the same to do.
    """
    busy = TOKENS_IN_A_PASS[device] // tokens if wanted == "auto" else wanted
    most = max(1, min(busy, int(SHARE * free) // max(1, kept), clients))
    passes = math.ceil(clients / most)
    if wanted != "auto" or passes == 1:
        return most
    return math.ceil(clients / (passes + passes % 2))


def activation_bytes(
    base: Base, task: Task, examples: Examples, start: AdapterState, roles: Roles, batch_size: int
) -> int:
    """Bytes that one client's step keeps for its backward pass, without model and adapter."""
    mean = examples.lengths.double().mean()
    rows = (examples.lengths - mean).abs().argsort(stable=True)[:batch_size]
    batch = collate(examples, rows, base.tokenizer.pad_token_id).to(base.device)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with base.holding(start):
        base.bank.train(roles)
        adapter = [*base.bank.leaves.values(), *base.bank.deltas.values()]
        standing = [*base.model.parameters(), *base.model.buffers(), *adapter]
        with base.running(batch) as given, saved_tensors_hooks(keep, lambda tensor: tensor):
            task.loss(base.model, given)
    for tensor in standing:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def worker_bytes(base: Base, plan: BankPlan, adapter: AdapterState) -> int:
    """Bytes that another process with this bank takes for itself: weights that are mapped from the
    checkpoint are in memory once."""
    weights = sum(tensor.nbytes for tensor in base.model.parameters())
    # of each client: its adapter, the gradients, and two states of an optimiser
    bank = max(plan.activations.values()) + 4 * plan.clients * adapter.num_bytes()
    return PROCESS + bank + (0 if is_mapped(base) else weights)


def is_mapped(base: Base) -> bool:
    """Whether the weights are pages of the checkpoint's file, which processes share (Linux)."""
    maps = Path("/proc/self/maps")
    place = max(base.model.parameters(), key=Tensor.numel).data_ptr()
    for line in maps.read_text().splitlines() if maps.exists() else ():
        span, *rest = line.split(maxsplit=5)
        low, high = (int(text, 16) for text in span.split("-"))
        if low <= place < high:
            return len(rest) == 5 and rest[4].startswith("/")
    return False


def free_bytes(device: str) -> int:
    """Memory available now, in bytes: the GPU's, or this machine's within its container's limit."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    # psutil reports the machine; a container's limit is in its cgroup (version 2)
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)
