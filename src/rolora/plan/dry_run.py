"""A run without training: who takes part, what travels, what the server keeps.

Clients' factors move at random. Everything else (the round loop, the method, the reducer, the
ledger) is that of a run, so what a method sends up and down is counted as in a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Assignment, Update
from rolora.algorithm.codec import Format, body_bytes, encode, num_bytes
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.seeding import generator
from rolora.training.engine import ClientMetrics, Job
from rolora.training.rounds import Federation, RunState, federate


@dataclass(frozen=True)
class Travelled:
    """Mean bytes that a client of a round's cohort sent and received."""

    up: float
    down: float


@dataclass(frozen=True)
class Untrained:
    """An engine whose clients send what they received, moved at random; it evaluates nothing.

    ``sizes``: client -> num_examples; ``up``: the format of uploads.
    """

    sizes: Mapping[str, int]
    up: Format = "fp32"

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
                noise[shape] = 1e-2 * torch.randn(shape, generator=rng)
            moved = {name: t + noise[t.shape].roll(number) for name, t in moving.items()}
            sent, like = method.upload(received, received | moved, info), received.only(shared)
            sent, size = sent.only(shared), num_bytes(self.up, like)
            if method.sparse_upload:
                size = body_bytes(encode(self.up, sent, like, {}, sparse=True)[0])
            yield Update(info.id, sent, info.num_examples, {"loss": 0.0}, size)

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterator[ClientMetrics]:
        """Nothing."""
        return iter(())


def dry_run(federation: Federation, start: AdapterState) -> tuple[list[Travelled], RunState]:
    """What travels in each round of a run on ``Untrained``, and the state after the last one."""
    travelled, state = [], RunState(ServerState(start))
    for result in federate(federation, state):
        state = result.state
        if result.round:
            size = len(result.cohort)
            travelled.append(Travelled(result.bytes_up / size, result.bytes_down / size))
    return travelled, state
