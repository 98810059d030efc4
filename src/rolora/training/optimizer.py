"""The local optimiser: one for all clients of a bank, with a state for each client alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Roles, partner_of, role_of
from rolora.model.bank import Bank
from rolora.training.settings import LocalSettings


class LocalOptimizer:
    """SGD or AdamW on the leaves of a loaded bank; a step is as if each client had its own.

    ``moments``: per client, the state to continue from (KEY/TENSOR -> value), empty for a new one.
    Clients that leave the bank must be dropped with ``keep``.
    """

    def __init__(
        self,
        bank: Bank,
        settings: LocalSettings,
        lr: float,
        moments: Sequence[Mapping[str, Tensor]],
    ) -> None:
        self._bank = bank
        self._settings = settings
        # parts of the leaves, which stay the same memory when clients leave the bank
        self._parts = {name: list(leaf.detach()) for name, leaf in bank.leaves.items()}
        ratios = {"B": settings.b_lr_ratio, "head": settings.head_lr_ratio}
        roles: dict[str, list[str]] = {}
        for name in self._parts:
            roles.setdefault(role_of(name), []).append(name)
        self._rates = {role: lr * ratios.get(role, 1.0) for role in roles}
        groups = [
            {"params": [part for name in names for part in self._parts[name]], "role": role}
            for role, names in roles.items()
        ]
        decay, momentum = settings.weight_decay, settings.momentum
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=decay, fused=True)
            if settings.optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=True)
        )
        for client, known in enumerate(moments):
            for path, value in known.items():
                key, name = path.split("/", 1)
                part = self._parts[name][client]
                whole = torch.zeros_like(part) if value.dim() else value.new_zeros(())
                whole[tuple(map(slice, value.shape))] = value
                self._optimizer.state[part][key] = whole.to(part.device)

    def step(self, trained: Roles) -> None:
        """Move what is ``trained`` by its gradient; other tensors with a gradient stay, and only
        their state is updated."""
        for name, leaf in self._bank.leaves.items():
            for client, part in enumerate(self._parts[name]):
                part.grad = None if leaf.grad is None else leaf.grad[client]
        for group in self._optimizer.param_groups:
            group["lr"] = self._rates[group["role"]] if group["role"] in trained else 0.0
        self._optimizer.step()
        self._optimizer.zero_grad()  # gradients would stay in memory during the next pass

    def keep(self, clients: int) -> None:
        """Drop all but the first clients."""
        self._parts = {name: parts[:clients] for name, parts in self._parts.items()}
        kept = {id(part) for parts in self._parts.values() for part in parts}
        for group in self._optimizer.param_groups:
            group["params"] = [part for part in group["params"] if id(part) in kept]

    def moments(self, client: int, start: AdapterState) -> dict[str, Tensor]:
        """The state of a client that began with ``start``; KEY/TENSOR -> value, on the CPU.

        A factor that had no gradient to begin with, because the other one was zero, is left out:
        its state would say that gradients are small.
        """
        found: dict[str, Tensor] = {}
        for name, parts in self._parts.items():
            partner = start.get(partner_of(name)) if role_of(name) in ("A", "B") else None
            if partner is not None and not partner.any():
                continue
            for key, value in self._optimizer.state.get(parts[client], {}).items():
                inside: Any = value[tuple(map(slice, start[name].shape))] if value.dim() else value
                found[f"{key}/{name}"] = inside.detach().to("cpu", copy=True).contiguous()
        return found
