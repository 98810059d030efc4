"""The second engine: the cohort trains at its sites, and what they answer is not believed.

``Remote`` asks the questions of ``rolora.sites.site``. It sends a site what the run's ledger says
it lacks; a site that finds another adapter than the one meant says so and gets all of it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rolora.algorithm.adapter import AdapterState, Assignment, Failure, Update
from rolora.algorithm.codec import WireError, body_bytes, decode, encode
from rolora.algorithm.ledger import lacking
from rolora.algorithm.method import Method
from rolora.config.load import config_hash
from rolora.config.schema import RunConfig
from rolora.errors import NoQuorum
from rolora.flower.membership import Lost, Member, Roster, checked
from rolora.flower.message import Parcel, ParcelError, digest, named
from rolora.model.base import Base
from rolora.training.engine import ClientMetrics, Job
from rolora.training.rounds import cohort_size


@dataclass(frozen=True)
class Remote:
    """Runs cohorts at their sites. ``base`` and ``labels`` are what sites are compared with."""

    roster: Roster
    config: RunConfig
    base: Base
    labels: tuple[Any, ...]

    def clients(self) -> Mapping[str, int]:
        """The sites that are there now: at least so many that a cohort of them can be a quorum.

        Raises NoQuorum if they are not within ``federation.wait`` seconds.
        """
        quorum, until = self.config.aggregate.quorum, time.monotonic() + self.config.federation.wait
        while True:
            present = self._present()
            if present and cohort_size(len(present), self.config.train.participation) >= quorum:
                return {name: member.num_examples for name, member in present.items()}
            if time.monotonic() > until:
                raise NoQuorum(
                    f"{len(present)} sites are there, too few for a cohort of {quorum} "
                    "(aggregate.quorum); finished rounds are saved, resume when others are back"
                )
            time.sleep(1)

    def _present(self) -> Mapping[str, Member]:
        return self.roster.present(self.base, self.labels)

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """Ask every site of the cohort to train; yield what comes back, checked, as it comes."""

        def train(assigned: Assignment, whole: bool) -> Parcel:
            info, received = assigned.info, assigned.received
            held = job.ledger.held.get(info.id)
            has = None if whole else held
            return self._with_view(
                "train",
                received,
                lacking(method, job.server, received, job.ledger, has),
                round=job.round,
                num_examples=info.num_examples,
                rank=info.rank,
                seed=job.seed,
                lr=job.lr,
                last=held.last if held else 0,
            )

        wanted, used = max(len(job.cohort) - self.config.federation.spare, 1), 0
        waiting = [assigned.info.id for assigned in job.cohort]
        for assigned, reply in self._asked(job.cohort, train):
            waiting.remove(assigned.info.id)
            update = self._update(method, assigned, reply)
            yield update
            count = assigned.info.num_examples
            used += isinstance(update, Update) and update.num_examples == count
            if used == wanted:
                break
        for client in waiting:
            yield Failure(
                client, f"not waited for: {wanted} others had answered (federation.spare)"
            )

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterator[ClientMetrics]:
        """Each site's metrics on its own held-out rows. No site has the server's test rows."""

        def score(assigned: Assignment, whole: bool) -> Parcel:
            info, view = assigned.info, assigned.received
            return self._with_view("score", view, view, round=info.round, rank=info.rank)

        for assigned, reply in self._asked(tuple(clients), score):
            info = assigned.info
            try:
                metrics = json.loads(checked(reply).text("metrics"))
                held_out = {str(k): float(v) for k, v in metrics.items()}
                yield ClientMetrics(info.id, held_out)
            except (ParcelError, ValueError, TypeError, AttributeError) as error:
                self.roster.tell(f"site {info.id} was not evaluated: {error}")

    def _asked(
        self, cohort: tuple[Assignment, ...], question: Callable[[Assignment, bool], Parcel]
    ) -> Iterator[tuple[Assignment, Parcel | Lost]]:
        """Answers of a cohort; a site that lacks what it should hold is asked again with all."""
        until = time.monotonic() + self.config.federation.deadline
        present = self._present()
        left = {present[a.info.id].node: a for a in cohort if a.info.id in present}
        for assigned in cohort:
            if assigned.info.id not in present:
                yield assigned, Lost("it is no longer there")
        for whole in (False, True):
            again = {}
            questions = {node: question(assigned, whole) for node, assigned in left.items()}
            for node, reply in self.roster.carrier.ask(questions, until - time.monotonic()):
                if not whole and isinstance(reply, Parcel) and reply.head.get("lacks") is True:
                    again[node] = left[node]
                else:
                    yield left[node], reply
            left = again

    def _with_view(
        self, ask: str, view: AdapterState, missing: AdapterState, **head: str | int | float
    ) -> Parcel:
        payload, _ = encode("fp32", missing, missing, {})
        names = named(missing.keys(), view.keys())
        return self.roster.question(ask, payload, view=digest(view), names=names, **head)

    def _update(
        self, method: Method, assigned: Assignment, reply: Parcel | Lost
    ) -> Update | Failure:
        info, view = assigned.info, assigned.received
        up, like = self.config.wire.up, view.only(method.shared(info.round))
        try:
            found = checked(reply)
            if found.text("site") != info.id:
                raise ParcelError(f"it now calls itself {found.text('site')!r}")
            if found.whole("round") != info.round:
                raise ParcelError(f"it is of round {found.whole('round')}, not {info.round}")
            tensors = decode(up, found.body, like, sparse=method.sparse_upload)
            metrics = {key: found.number(key) for key in ("loss", "steps")}
            count = found.whole("num_examples")
        except (ParcelError, WireError) as error:
            return Failure(info.id, str(error))
        adapter = AdapterState(tensors, view.scaling)
        return Update(info.id, adapter, count, metrics, body_bytes(found.body))


def run_id(config: RunConfig, folder: Path) -> str:
    """What sites call a run: a hash of what defines it and of where its folder is."""
    return hashlib.sha256(f"{config_hash(config)}{folder.resolve()}".encode()).hexdigest()[:16]
