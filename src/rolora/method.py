"""The contract of a federated-LoRA method: a record of small pure functions.

A method never sees a model, a network, or a raw client update: ``aggregate`` gets ``reduce``, which
it calls once a round, so that checks, robust rules and clipping apply to every method alike.

>>> from rolora.method import get_method
>>> rolora = get_method("rolora", first="B")
>>> [sorted(rolora.shared(round) - {"head"}) for round in (1, 2, 3)]
[['B'], ['A'], ['B']]
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rolora.adapter import AdapterState, ClientInfo, Roles, Specs, Update
from rolora.errors import ConfigError, nearest
from rolora.reduce import Memory, Value

Project = Callable[[AdapterState], Value]


class Reduce(Protocol):
    """``reduce(project=..., weight=...)`` -> the combined value. To be called once a round.

    ``project`` maps what a client holds (what it received overlaid with what it sent) to the space
    that is reduced; left out, the shared tensors themselves. ``weight`` maps an update to its
    weight; left out, the run's setting (num_examples or uniform).
    """

    def __call__(
        self, project: Project | None = None, weight: Callable[[Update], float] | None = None
    ) -> Value: ...


@dataclass(frozen=True)
class ServerState:
    """All that the server carries from round to round.

    ``round`` counts finished rounds, so the round being run is ``round + 1``; ``attempt`` counts
    tries of it that found no quorum. ``memory`` is the reducer's.
    """

    adapter: AdapterState
    memory: Memory = field(default_factory=dict)
    round: int = 0
    attempt: int = 0


def lora_init(specs: Specs, rng: torch.Generator) -> AdapterState:
    """lora_A ~ U(−1/√in, 1/√in) (Kaiming uniform with a = √5, as PEFT), lora_B = 0; float32.

    Where the model asks for it (``specs.b_std``), lora_B is normal: one that learns nothing from 0.

    Head weights that the checkpoint lacks are normal, head biases 0, as transformers does.
    """
    tensors: dict[str, Tensor] = {}
    for spec in specs.tensors:
        if spec.role == "A":
            bound = 1 / math.sqrt(spec.shape[1])
            tensors[spec.name] = (torch.rand(spec.shape, generator=rng) * 2 - 1) * bound
        elif spec.name in specs.head:
            tensors[spec.name] = specs.head[spec.name]
        elif spec.role == "head" and len(spec.shape) > 1:
            tensors[spec.name] = torch.randn(spec.shape, generator=rng) * specs.head_std
        elif spec.role == "B" and specs.b_std:
            tensors[spec.name] = torch.randn(spec.shape, generator=rng) * specs.b_std
        else:
            tensors[spec.name] = torch.zeros(spec.shape)
    return AdapterState(tensors, specs.scaling)


def whole_adapter(server: ServerState, client: ClientInfo) -> AdapterState:
    """A client should hold the whole adapter; only what it lacks travels."""
    return server.adapter


def merge_shared(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    """The reduced shared tensors replace the server's; the others stay bit for bit."""
    return replace(server, adapter=server.adapter | reduce())


@dataclass(frozen=True, kw_only=True)
class Method:
    """One federated-LoRA method. ``round`` starts at 1; ``local step`` at 0.

    ``trainable(round, local step)``: the roles that get gradients. ``shared(round)``: the roles
    that travel up; what is trained but not shared is personal and stays with the client.
    ``download``: what a client should hold before it trains. ``pooled``: one client that holds all
    rows and takes the cohort's steps (an upper bound, not a federation).
    """

    name: str
    trainable: Callable[[int, int], Roles]
    shared: Callable[[int], Roles]
    init: Callable[[Specs, torch.Generator], AdapterState] = lora_init
    download: Callable[[ServerState, ClientInfo], AdapterState] = whole_adapter
    aggregate: Callable[[ServerState, Reduce, torch.Generator], ServerState] = merge_shared
    pooled: bool = False

    def personal(self, round: int) -> Roles:
        """Roles trained in this round that never leave the client."""
        return self.trainable(round, 0) - self.shared(round)


def freeze_head(method: Method) -> Method:
    """The same method with the task head frozen: it travels down once and is never trained."""
    head: Roles = frozenset({"head"})
    return replace(
        method,
        trainable=lambda round, step: method.trainable(round, step) - head,
        shared=lambda round: method.shared(round) - head,
    )


def method_names() -> list[str]:
    """The names of all methods: the files of the folder ``rolora/methods``."""
    folder = Path(__file__).with_name("methods")
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def method_factory(name: str) -> Callable[..., Method]:
    """The ``method(*, ...)`` function of the file ``methods/<name>.py``; its keywords are options.

    Raises ConfigError for a name that is no file there.
    """
    if name not in method_names():
        raise ConfigError(f"unknown method {name!r}: {nearest(name, method_names())}")
    factory: Callable[..., Method] = importlib.import_module(f"rolora.methods.{name}").method
    return factory


def get_method(name: str, **options: Any) -> Method:
    """The method of this name with these options. Raises ConfigError for an unknown one."""
    factory = method_factory(name)
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "it takes no options"
            raise ConfigError(f"method {name!r} has no option {option!r}: {hint}")
    return factory(**options)
