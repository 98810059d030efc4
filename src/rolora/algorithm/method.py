"""The contract of a federated-LoRA method: a record of small pure functions.

A method never sees a model, a network, or a raw client update: ``aggregate`` gets ``reduce``, which
it calls once a round, so that checks, robust rules and clipping apply to every method alike.

>>> from rolora.algorithm.method import get_method
>>> rolora = get_method("rolora", first="B")
>>> [sorted(rolora.shared(round) - {"head"}) for round in (1, 2, 3)]
[['B'], ['A'], ['B']]
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Roles, Specs, Update
from rolora.algorithm.reduce import Memory, Value
from rolora.errors import ConfigError, nearest

BOTH: Roles = frozenset({"A", "B", "head"})  # what LoRA trains: both factors, and the head
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


def kaiming(shape: Sequence[int], rng: torch.Generator) -> Tensor:
    """A lora_A (rank, in) ~ U(−1/√in, 1/√in): Kaiming uniform with a = √5, as PEFT; float32."""
    return (torch.rand(*shape, generator=rng) * 2 - 1) / math.sqrt(shape[1])


def lora_init(specs: Specs, rng: torch.Generator) -> AdapterState:
    """lora_A as ``kaiming``, lora_B = 0; float32.

    Where the model asks for it (``specs.b_std``), lora_B is normal: one that learns nothing from 0.

    Head weights that the checkpoint lacks are normal, head biases 0, as transformers does.
    """
    tensors: dict[str, Tensor] = {}
    for spec in specs.tensors:
        if spec.role == "A":
            tensors[spec.name] = kaiming(spec.shape, rng)
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


def as_trained(received: AdapterState, trained: AdapterState, client: ClientInfo) -> AdapterState:
    """A client sends what it has trained."""
    return trained


def merge_shared(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    """The reduced shared tensors replace the server's; the others stay bit for bit."""
    return replace(server, adapter=server.adapter | reduce())


@dataclass(frozen=True, kw_only=True)
class Method:
    """One federated-LoRA method. ``round`` starts at 1; ``local step`` at 0.

    What it does, as functions:

    - ``init(specs, rng)``: the first adapter; with ``from_gradient``, ``specs.gradient`` is there.
    - ``download(server, client)``: what a client should hold before it trains.
    - ``trainable(round, local step)``: the roles that get gradients.
    - ``gradient(name, gradients (clients, *shape))``: what the optimiser gets in their place.
    - ``penalty(adapter)``: a scalar that is added to a client's loss.
    - ``upload(received, trained, client)``: what leaves the client, of the same shapes.
    - ``shared(round)``: the roles that travel up; the rest of what was trained is personal.
    - ``aggregate(server, reduce, rng)``: the next server state; calls ``reduce`` once.

    What it is, for users and for refusals:

    - ``pooled``: one client with all rows that takes the cohort's steps: a bound, no federation.
    - ``exact``: the server's product is the mean of the clients' products.
    - ``ranks``: clients may have ranks of their own.
    - ``rebased``: factors are made anew each round, so nothing may be remembered of them.
    - ``secure``: the server needs no more than a weighted sum of what clients send.
    - ``sparse``: of what is sent, rank-one pieces that are as they were received do not travel.
    """

    name: str
    trainable: Callable[[int, int], Roles]
    shared: Callable[[int], Roles]
    init: Callable[[Specs, torch.Generator], AdapterState] = lora_init
    download: Callable[[ServerState, ClientInfo], AdapterState] = whole_adapter
    gradient: Callable[[str, Tensor], Tensor] | None = None
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    upload: Callable[[AdapterState, AdapterState, ClientInfo], AdapterState] = as_trained
    aggregate: Callable[[ServerState, Reduce, torch.Generator], ServerState] = merge_shared
    from_gradient: bool = False
    pooled: bool = False
    exact: bool = True
    ranks: bool = False
    rebased: bool = False
    secure: bool = True
    sparse: bool = False

    def trained(self, round: int) -> Roles:
        """Roles trained in this round; where they take turns within it, they do at every step."""
        return self.trainable(round, 0) | self.trainable(round, 1)

    def personal(self, round: int) -> Roles:
        """Roles trained in this round that never leave the client."""
        return self.trained(round) - self.shared(round)

    @property
    def kept(self) -> Roles:
        """Roles of which each client keeps its own, in whatever round they are trained."""
        return self.personal(1) | self.personal(2)

    @property
    def averaged(self) -> bool:
        """Whether the server's tensors are averages of what clients send, and nothing else.

        Only then does a move of one round say something of the next, as server optimisers take it.
        """
        return self.secure and not self.rebased and not self.pooled and bool(self.shared(1))


def freeze_head(method: Method) -> Method:
    """The same method with the task head frozen: it travels down once and is never trained."""
    head: Roles = frozenset({"head"})

    def aggregate(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
        after = method.aggregate(server, reduce, rng)
        return replace(after, adapter=after.adapter | server.adapter.only(head))

    return replace(
        method,
        aggregate=aggregate,
        trainable=lambda round, step: method.trainable(round, step) - head,
        shared=lambda round: method.shared(round) - head,
    )


def method_names() -> list[str]:
    """The names of all methods: the files of the folder ``rolora/methods``."""
    folder = Path(__file__).parent.parent / "methods"
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
