"""An engine among whose clients some are bad."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from rolora.algorithm.adapter import AdapterState, Assignment, Failure, Update
from rolora.algorithm.method import Method
from rolora.algorithm.seeding import derived_seed
from rolora.algorithm.step import Aggregation, step
from rolora.attacks.attack import Attack, Scene, Sent
from rolora.training.engine import ClientMetrics, Engine, Job


@dataclass(frozen=True)
class Attacked:
    """``engine``, of whose clients the ``bad`` ones do what ``attack`` says.

    ``aggregation`` is the server's, so that attackers know what it will do with what they send. A
    round without a bad or without an honest client is left as it is.
    """

    engine: Engine
    attack: Attack
    bad: frozenset[str]
    aggregation: Aggregation

    def clients(self) -> Mapping[str, int]:
        """As the engine's, with the rows that bad clients claim."""
        claim = self.attack.claim or (lambda count: count)
        known = self.engine.clients()
        return {c: claim(count) if c in self.bad else count for c, count in known.items()}

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """As the engine's, with what bad clients forge in place of what they trained."""
        replies = list(self.engine.run(method, job))
        forged = self._forged(method, job, [one for one in replies if isinstance(one, Update)])
        for reply in replies:
            if isinstance(reply, Update) and reply.client in forged:
                yield replace(reply, adapter=forged[reply.client])
            else:
                yield reply

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterable[ClientMetrics]:
        """As the engine's."""
        return self.engine.evaluate(method, clients)

    def _forged(self, method: Method, job: Job, updates: list[Update]) -> Sent:
        own = {one.client: one.adapter for one in updates if one.client in self.bad}
        honest = {one.client: one.adapter for one in updates if one.client not in self.bad}
        if self.attack.forge is None or not own or not honest:
            return {}
        cohort = {one.info.id: one for one in job.cohort}
        aggregation = replace(self.aggregation, exactness=False)
        seed = derived_seed(job.seed, "attack", job.round)

        def outcome(sent: Sent) -> AdapterState | None:
            replies = [replace(u, adapter=sent.get(u.client, u.adapter)) for u in updates]
            rng = torch.Generator().manual_seed(seed)
            after, report = step(method, aggregation, job.server, cohort, replies, rng)
            return after.adapter if report.quorum_met else None

        rng = torch.Generator().manual_seed(seed)
        start, trained = job.server.adapter, method.trained(job.round)
        return self.attack.forge(Scene(cohort, honest, own, trained, start, outcome, rng))
