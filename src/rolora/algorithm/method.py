"""The contract of a federated-LoRA method: a record of small pure functions.

A method never sees a model, a network, or a client's update: ``aggregate`` gets ``reduce``, which
it calls once a round, so checks, robust rules and clipping apply to every method alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Roles, Specs, Update
from rolora.algorithm.reduce import Memory, Value

BOTH: Roles = frozenset({"A", "B", "head"})  # what plain LoRA trains
B_ALONE: Roles = frozenset({"B", "head"})
CORE: Roles = frozenset({"core", "head"})
Project = Callable[[AdapterState], Value]


@dataclass(frozen=True)
class Reduce:
    """``reduce(project=..., weight=...)`` -> the combined value. Call it once a round.

    ``project`` maps a client's adapter (what it received overlaid with what it sent) to the tensors
    that are reduced; by default the shared tensors themselves. ``weight`` maps an update to its
    weight; by default the run's setting (num_examples or uniform). ``ranks``: the different ranks
    of the round's clients, the smallest first.
    """

    combine: Callable[[Project | None, Callable[[Update], float] | None], Value]
    ranks: tuple[int, ...]

    def __call__(
        self, project: Project | None = None, weight: Callable[[Update], float] | None = None
    ) -> Value:
        return self.combine(project, weight)


@dataclass(frozen=True)
class ServerState:
    """Everything that the server carries from round to round; ``memory`` is the reducer's.

    ``round`` counts finished rounds, so the round being run is ``round + 1``; ``attempt`` counts
    its attempts that found no quorum. ``patches``: from what the last round's changes can be made
    (see ``rolora.algorithm.patches``).
    """

    adapter: AdapterState
    memory: Memory = field(default_factory=dict)
    round: int = 0
    attempt: int = 0
    patches: Mapping[str, Tensor] = field(default_factory=dict)


def kaiming(shape: Sequence[int], rng: torch.Generator) -> Tensor:
    """A lora_A (rank, in) ~ U(−1/√in, 1/√in): Kaiming uniform with a = √5, as PEFT; float32."""
    return (torch.rand(*shape, generator=rng) * 2 - 1) / math.sqrt(shape[1])


def lora_init(specs: Specs, rng: torch.Generator) -> AdapterState:
    """lora_A from ``kaiming``, lora_B = 0; float32.

    lora_B is normal if ``specs.b_std`` says so: some models learn nothing from 0. Head weights that
    the checkpoint lacks are normal and head biases 0, as in transformers.
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
    """A client should have the whole adapter; only what it does not hold travels."""
    return server.adapter


def as_trained(received: AdapterState, trained: AdapterState, client: ClientInfo) -> AdapterState:
    """A client sends its tensors as it trained them."""
    return trained


def merge_shared(server: ServerState, reduce: Reduce, rng: torch.Generator) -> ServerState:
    """The reduced shared tensors replace the server's; the others do not change."""
    return replace(server, adapter=server.adapter | reduce())


def each_for_itself(drawn: tuple[ClientInfo, ...], num_examples: int) -> tuple[ClientInfo, ...]:
    """Every client that was drawn trains on its own rows."""
    return drawn


@dataclass(frozen=True, kw_only=True)
class Method:
    """One federated-LoRA method. ``round`` starts at 1, ``local step`` at 0.

    Functions:

    - ``init(specs, rng)``: the first adapter.
    - ``cohort(drawn, num_examples)``: the clients that train in place of those drawn, where
      ``num_examples`` counts the rows of all clients of the run.
    - ``download(server, client)``: the adapter that a client should have before it trains.
    - ``trainable(round, local step)``: the roles that get gradients.
    - ``gradient(name, gradients (clients, *shape), leaves)``: replaces what the optimiser gets;
      ``leaves`` maps every tensor's name to its values (clients, *shape).
    - ``penalty(adapter)``: a scalar added to a client's loss.
    - ``upload(received, trained, client)``: what leaves the client, in the same shapes.
    - ``shared(round)``: the roles that travel up; other trained roles are personal.
    - ``aggregate(server, reduce, rng)``: the next server state; calls ``reduce`` once.

    Properties:

    - ``exact``: the server's product is the mean of the clients' products.
    - ``needs_gradient``: ``init`` needs ``specs.gradient``.
    - ``heterogeneous_ranks``: clients may have different LoRA ranks.
    - ``whole_products``: clients of different ranks are reduced as whole products; otherwise as
      pieces, which a client of a smaller rank lacks, and only their mean can be taken.
    - ``resets_factors``: the server makes new factors each round, so no state about them is kept.
    - ``sum_only``: the server needs only a weighted sum of what clients send (secure aggregation).
    - ``sparse_upload``: rank-one pieces that did not change do not travel; a secure sum would need
      them all.
    """

    name: str
    trainable: Callable[[int, int], Roles]
    shared: Callable[[int], Roles]
    init: Callable[[Specs, torch.Generator], AdapterState] = lora_init
    cohort: Callable[[tuple[ClientInfo, ...], int], tuple[ClientInfo, ...]] = each_for_itself
    download: Callable[[ServerState, ClientInfo], AdapterState] = whole_adapter
    gradient: Callable[[str, Tensor, Mapping[str, Tensor]], Tensor] | None = None
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    upload: Callable[[AdapterState, AdapterState, ClientInfo], AdapterState] = as_trained
    aggregate: Callable[[ServerState, Reduce, torch.Generator], ServerState] = merge_shared
    exact: bool = True
    needs_gradient: bool = False
    heterogeneous_ranks: bool = False
    whole_products: bool = False
    resets_factors: bool = False
    sum_only: bool = True
    sparse_upload: bool = False

    def trained(self, round: int) -> Roles:
        """Roles trained in this round; methods that alternate within a round do so every step."""
        return self.trainable(round, 0) | self.trainable(round, 1)

    def personal(self, round: int) -> Roles:
        """Roles trained in this round that never leave the client."""
        return self.trained(round) - self.shared(round)

    @property
    def personal_roles(self) -> Roles:
        """Roles that each client keeps to itself, in whatever round they are trained."""
        return self.personal(1) | self.personal(2)

    @property
    def federated(self) -> bool:
        """Whether clients train on their own rows; if not, nothing travels."""
        client = ClientInfo("client", num_examples=1, rank=1, round=1)
        return not any(one.members for one in self.cohort((client,), 1))

    @property
    def supports_server_optimizer(self) -> bool:
        """Whether the server's tensors are averages of what clients send, and nothing else.

        Only then does the move of one round say something about the next.
        """
        averages = self.sum_only and not self.resets_factors
        return averages and self.federated and bool(self.shared(1))


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
