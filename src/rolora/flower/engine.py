"""The engine for real machines: the cohort trains at its sites, and every answer is checked.

A site is sent the tensors that it lacks by the run's ledger, with a hash of the whole adapter that
it should then have. If it has another one, it answers that it ``lacks`` some, and is sent all.
The sites' side is ``rolora.sites.site``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from rolora.algorithm.adapter import AdapterState, Assignment, Failure, Update
from rolora.algorithm.codec import body_bytes, decode, encode, num_bytes
from rolora.algorithm.ledger import lacking
from rolora.algorithm.method import Method
from rolora.algorithm.patches import layout, rank_of
from rolora.errors import NoQuorum
from rolora.flower.membership import Membership, Unusable, attempt
from rolora.flower.message import (
    MessageError,
    Scalar,
    SiteMessage,
    compress_names,
    digest,
    lost,
    read_metrics,
)
from rolora.run.experiment import Experiment
from rolora.training.engine import ClientMetrics, Job
from rolora.training.rounds import cohort_size


@dataclass(frozen=True)
class Remote:
    """Runs cohorts at their sites, which must have the experiment's base model and labels.

    ``expect`` is told, before each round, how many bytes the largest update may have.
    """

    membership: Membership
    experiment: Experiment
    expect: Callable[[int], None] = lambda size: None

    def clients(self) -> Mapping[str, int]:
        """Site name -> number of rows, of the sites that can be reached now.

        Waits until a cohort of them can be a quorum, and until the trusted site is one of them;
        raises NoQuorum if it cannot after ``federation.wait`` seconds.
        """
        config, fewest = self.experiment.config, self.experiment.aggregation.fewest
        trusted = config.aggregate.trusted
        until = time.monotonic() + config.federation.wait
        while True:
            present = self.membership.present(self.experiment.base, self.experiment.labels)
            missing = trusted is not None and trusted not in present
            enough = cohort_size(len(present), config.train.participation) >= fewest
            if present and enough and not missing:
                return {name: member.num_examples for name, member in present.items()}
            if time.monotonic() > until and missing:
                names = ", ".join(present) or "none"
                raise NoQuorum(
                    f"site {trusted}, which is trusted (aggregate.trusted), is not connected; "
                    f"connected: {names}; finished rounds are saved"
                )
            if time.monotonic() > until:
                raise NoQuorum(
                    f"{len(present)} sites are connected, too few for a cohort of {fewest} "
                    "(aggregate.quorum, or what the reducer needs); finished rounds are saved"
                )
            time.sleep(1)

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """Ask the sites of the cohort to train; yield each checked answer as it comes."""

        def train(assigned: Assignment, whole: bool) -> SiteMessage:
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

        up = self.experiment.config.wire.up
        self.expect(max((num_bytes(up, _sent(method, one)) for one in job.cohort), default=0))
        wanted, used = max(len(job.cohort) - self.experiment.config.federation.spare, 1), 0
        waiting = [assigned.info.id for assigned in job.cohort]
        trusted = self.experiment.config.aggregate.trusted  # it is always waited for
        for assigned, reply in self._asked(job.cohort, train):
            waiting.remove(assigned.info.id)
            update = self._update(method, assigned, reply)
            if isinstance(update, Update):
                self.membership.trained(assigned.info.id)
            yield update
            count = assigned.info.num_examples
            used += isinstance(update, Update) and update.num_examples == count
            if used >= wanted and trusted not in waiting:
                break
        for client in waiting:
            why = f"not needed: {wanted} others answered first (federation.spare)"
            yield Failure(client, why, missing=True)

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterator[ClientMetrics]:
        """Each site's metrics on its held-out rows; sites do not have the server's test rows."""

        def score(assigned: Assignment, whole: bool) -> SiteMessage:
            info, view = assigned.info, assigned.received
            return self._with_view("score", view, view, round=info.round, rank=info.rank)

        kind = self.experiment.kind
        known = {*kind.metrics, *kind.answers}
        for assigned, reply in self._asked(tuple(clients), score):
            client = assigned.info.id
            found = attempt(lambda answer: read_metrics(answer.text("metrics"), known), reply)
            if isinstance(found, Unusable):
                self.membership.notify(f"site {client} was not evaluated: {found.reason}")
            else:
                yield ClientMetrics(client, found)

    def _asked(
        self, cohort: tuple[Assignment, ...], question: Callable[[Assignment, bool], SiteMessage]
    ) -> Iterator[tuple[Assignment, SiteMessage]]:
        """The cohort's answers as they come. A site that ``lacks`` tensors is asked again."""
        until = time.monotonic() + self.experiment.config.federation.deadline
        present, left = self.membership.reachable(), {}
        for assigned in cohort:
            if member := present.get(assigned.info.id):
                left[member.node] = assigned
            else:
                yield assigned, lost("it is no longer connected")
        for whole in (False, True):
            again = {}
            questions = {node: question(assigned, whole) for node, assigned in left.items()}
            for node, reply in self.membership.transport.ask(questions, until - time.monotonic()):
                if reply.head.get("lost") is True:
                    self.membership.missed(node)
                if not whole and reply.head.get("lacks") is True:
                    again[node] = left[node]
                else:
                    yield left[node], reply
            left = again

    def _with_view(
        self, ask: str, view: AdapterState, missing: AdapterState, **head: Scalar
    ) -> SiteMessage:
        payload, _ = encode("fp32", missing, missing, {})
        rank = rank_of(missing)
        names = compress_names(missing.keys(), layout(view, rank).keys())
        head = {"growth": rank, "view": digest(view), "names": names, **head}
        return self.membership.question(ask, payload, **head)

    def _update(self, method: Method, assigned: Assignment, reply: SiteMessage) -> Update | Failure:
        info, view = assigned.info, assigned.received
        up, like = self.experiment.config.wire.up, _sent(method, assigned)

        def used(answer: SiteMessage) -> Update:
            if (name := answer.text("site")) != info.id:
                raise MessageError(f"it now calls itself {name!r}")
            if (round := answer.integer("round")) != info.round:
                raise MessageError(f"it is for round {round}, not {info.round}")
            tensors = decode(up, answer.body, like, sparse=method.sparse_upload)
            told = ("loss", "steps", "moved") if "loss" in answer.head else ("steps", "moved")
            metrics = {key: answer.number(key) for key in told}
            count = answer.integer("num_examples")
            adapter = AdapterState(tensors, view.scaling)
            return Update(info.id, adapter, count, metrics, body_bytes(answer.body))

        found = attempt(used, reply)
        if isinstance(found, Unusable):
            missing = bool(reply.head.keys() & {"error", "lacks"})
            return Failure(info.id, found.reason, missing)
        return found


def _sent(method: Method, assigned: Assignment) -> AdapterState:
    """The tensors that a client sends, as it received them."""
    return assigned.received.only(method.shared(assigned.info.round))
