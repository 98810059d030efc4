"""A run in which nobody trains: who takes part, what travels, what the server keeps.

Clients' factors move at random instead of by training. Everything else is the real thing (the
round loop, the method, the reducer, the ledger), so whatever a method sends or hands out is counted
as it would be in a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Update
from rolora.algorithm.codec import Format, body_bytes, encode, num_bytes
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.seeding import generator
from rolora.training.engine import POOL, ClientMetrics, Job
from rolora.training.rounds import Federation, RunState, federate


@dataclass(frozen=True)
class Travelled:
    """What one client of a round's cohort sent and received, in bytes, on average."""

    up: float
    down: float


@dataclass(frozen=True)
class Untrained:
    """An engine whose clients send what they received, moved at random; it evaluates nothing.

    ``sizes``: client -> num_examples; ``up``: how uploads travel.
    """

    sizes: Mapping[str, int]
    up: Format = "fp32"

    def clients(self) -> Mapping[str, int]:
        """Every client, always."""
        return self.sizes

    def run(self, method: Method, job: Job) -> Iterator[Update]:
        """What each client of the cohort sends."""
        pool = replace(job.cohort[0], id=POOL, num_examples=sum(self.sizes.values()))
        rng = generator(job.seed, "dry run", job.round)
        noise: dict[torch.Size, Tensor] = {}
        for number, client in enumerate((pool,) if method.pooled else job.cohort):
            received, shared = method.download(job.server, client), method.shared(job.round)
            moving = received.only(method.trained(job.round))
            for shape in {tensor.shape for tensor in moving.values()} - noise.keys():
                noise[shape] = 1e-2 * torch.randn(shape, generator=rng)
            moved = {name: t + noise[t.shape].roll(number) for name, t in moving.items()}
            sent, like = method.upload(received, received | moved, client), received.only(shared)
            sent, size = sent.only(shared), num_bytes(self.up, like)
            if method.sparse:
                size = body_bytes(encode(self.up, sent, like, {}, sparse=True)[0])
            yield Update(client.id, sent, client.num_examples, {"loss": 0.0}, size)

    def evaluate(
        self, method: Method, server: ServerState, clients: Sequence[ClientInfo]
    ) -> Iterator[ClientMetrics]:
        """Nothing."""
        return iter(())


def dry_run(federation: Federation, start: AdapterState) -> tuple[list[Travelled], RunState]:
    """All rounds of a run on an engine such as ``Untrained``, and the state after the last one."""
    travelled, state = [], RunState(ServerState(start))
    for result in federate(federation, state):
        state = result.state
        if result.round:
            size = len(result.cohort)
            travelled.append(Travelled(result.bytes_up / size, result.bytes_down / size))
    return travelled, state
