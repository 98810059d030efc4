"""A run without training: who takes part, what travels, what the server keeps.

Clients' factors move at random. Everything else (the round loop, the method, the reducer, the
ledger) is that of a run, so what a method sends up and down is counted as in a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rolora.algorithm.adapter import Assignment, Roles, Specs, TensorSpec, Update, role_of
from rolora.algorithm.choices import Format
from rolora.algorithm.codec import body_bytes, encode, num_bytes
from rolora.algorithm.ledger import lacking
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.seeding import generator
from rolora.training.engine import ClientMetrics, Job
from rolora.training.rounds import Federation, RunState, federate


@dataclass(frozen=True)
class Untrained:
    """An engine whose clients send what they received, moved at random; it evaluates nothing.

    ``sizes``: client -> num_examples; ``up``: the format of uploads; ``moves``: their sd.
    """

    sizes: Mapping[str, int]
    up: Format = "fp32"
    moves: float = 1e-2

    def clients(self) -> Mapping[str, int]:
        """Every client, always."""
        return self.sizes

    def run(self, method: Method, job: Job) -> Iterator[Update]:
        """An update of each client of the cohort."""
        rng = generator(job.seed, "dry run", job.round)
        noise: dict[torch.Size, Tensor] = {}
        for number, assigned in enumerate(job.cohort):
            info, received, shared = assigned.info, assigned.received, method.shared(job.round)
            moving = received.only(method.trained(job.round))
            for shape in {tensor.shape for tensor in moving.values()} - noise.keys():
                noise[shape] = self.moves * torch.randn(shape, generator=rng)
            moved = {name: t + noise[t.shape].roll(number) for name, t in moving.items()}
            sent, like = method.upload(received, received | moved, info), received.only(shared)
            sent, size = sent.only(shared), num_bytes(self.up, like)
            if method.sparse_upload:
                size = body_bytes(encode(self.up, sent, like, {}, sparse=True)[0])
            yield Update(info.id, sent, info.num_examples, {"loss": 0.0}, size)

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterator[ClientMetrics]:
        """Nothing."""
        return iter(())


@dataclass(frozen=True)
class Travel:
    """What travels in one round between the server and a client that took part before."""

    up: Roles
    down: Roles
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Observed(Untrained):
    """Appends what travels to and from the first client of each cohort to ``seen``."""

    moves: float = 0.1
    seen: list[Travel] = field(default_factory=list)

    def run(self, method: Method, job: Job) -> Iterator[Update]:
        """As ``Untrained``."""
        first, *others = super().run(method, job)
        info, received = job.cohort[0].info, job.cohort[0].received
        down = lacking(method, job.server, received, job.ledger, job.ledger.held.get(info.id))
        up, into = (frozenset(map(role_of, each)) for each in (first.adapter, down))
        self.seen.append(Travel(up, into, first.num_bytes(), down.num_bytes()))
        return iter([first, *others])


def travels(method: Method, out: int, width: int, rank: int) -> list[Travel]:
    """Rounds 1, 2 and 3 of two clients, on one adapted layer (out, width) without a task head.

    Nothing travels in a method that is not federated.
    """
    if not method.federated:
        return [Travel(frozenset(), frozenset(), 0, 0)] * 3
    layer, rng = "base_model.model.layer", generator(0, "travels")
    specs = Specs(
        (
            TensorSpec(f"{layer}.lora_A.weight", "A", (rank, width)),
            TensorSpec(f"{layer}.lora_B.weight", "B", (out, rank)),
        ),
        scaling={layer: 1.0},
        head={},
        gradient={layer: torch.randn(out, width, generator=rng)},
    )
    engine = Observed({"one": 1, "two": 1})
    federation = Federation(method=method, engine=engine, rounds=3, lr=lambda round: 0.0)
    deque(federate(federation, RunState(ServerState(method.init(specs, rng)))), maxlen=0)
    return engine.seen
