"""Engines: they run a cohort on the machines that train.

``InProcess`` trains many clients at once on one base model. ``Debug`` trains them one at a time and
names the client and the stage that broke.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from rolora.algorithm.adapter import (
    AdapterState,
    Assignment,
    ClientInfo,
    Failure,
    Update,
    role_of,
)
from rolora.algorithm.choices import Format
from rolora.algorithm.codec import WireError, body_bytes, decode, encode
from rolora.algorithm.ledger import Ledger
from rolora.algorithm.method import Method, ServerState
from rolora.data.examples import Examples
from rolora.errors import RoloraError
from rolora.model.base import Base
from rolora.tasks.registry import Task
from rolora.training.client_store import ClientStore
from rolora.training.local import Trained, Work, evaluate, train_group
from rolora.training.settings import LocalSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One round's work: the server's state, the cohort in order of use, the seed, the step size.

    ``ledger`` says what each client holds, for an engine that sends only what a client lacks.
    """

    server: ServerState
    cohort: tuple[Assignment, ...]
    seed: int
    lr: float
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def round(self) -> int:
        """The round being run, from 1."""
        return self.server.round + 1


@dataclass(frozen=True)
class Evaluation:
    """An adapter's metrics on the server's rows; ``validation`` decides about the best round.

    ``recall``: see ``rolora.tasks.registry.Task``; of the rows behind ``metrics``.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)
    recall: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientMetrics:
    """One client's metrics on its own held-out rows and, for personal adapters, on the server's."""

    client: str
    held_out: Mapping[str, float]
    server: Evaluation = field(default_factory=Evaluation)


class Engine(Protocol):
    """Knows the clients, runs those of a round, and evaluates personal adapters where they are."""

    def clients(self) -> Mapping[str, int]:
        """The clients that can take part now: id -> num_examples."""

    def run(self, method: Method, job: Job) -> Iterable[Update | Failure]:
        """Train the job's cohort; yield what each client sends, in any order."""

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterable[ClientMetrics]:
        """Evaluate each client's adapter after the round in its ``info`` on its held-out rows."""


@dataclass(frozen=True)
class InProcess:
    """Trains ``bank_size`` clients at a time on one base model in this process.

    ``shards`` maps client -> row indices into ``examples``; ``held_out`` gives the rows, if any,
    that a client never trains on; ``evaluation`` measures an adapter on the server's rows. ``up``
    is the format in which uploads travel: each is encoded and decoded, unless it is dense float32,
    which that would not change; with None updates are not encoded here. ``bank_size`` changes
    results by floating-point rounding only.
    """

    base: Base
    task: Task
    examples: Examples
    shards: Mapping[str, Tensor]
    settings: LocalSettings
    store: ClientStore
    bank_size: int = 16
    held_out: Callable[[str], Examples | None] = lambda client: None
    evaluation: Callable[[AdapterState], Evaluation] = lambda adapter: Evaluation()
    up: Format | None = "fp32"

    @property
    def _moments(self) -> ClientStore:
        """Where clients keep the state of their optimisers."""
        return replace(self.store, kind="moments")

    def clients(self) -> Mapping[str, int]:
        """Every client, always."""
        return {client: len(rows) for client, rows in self.shards.items()}

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """Train the cohort in its order, in groups of about equal size.

        A group that does not fit in memory is halved, and so are all groups after it.
        """
        left = job.cohort
        while left:
            cohort = self.groups(left)[0]
            work = [self.prepare(assigned) for assigned in cohort]
            try:
                group = self.train(method, job, work)
            except RuntimeError as error:
                if not starved(error):
                    raise
                self.halve(len(cohort))
                continue
            for assigned, trained in zip(cohort, group, strict=True):
                yield self.finish(method, assigned, trained)
            left = left[len(cohort) :]

    def groups(self, cohort: Sequence[Assignment]) -> list[Sequence[Assignment]]:
        """The cohort in groups of about equal size, each of which fits in memory."""
        most = min(self.bank_size, self.base.bank.most or self.bank_size)
        found: list[Sequence[Assignment]] = []
        while cohort:
            size = group_size(len(cohort), most)
            found.append(cohort[:size])
            cohort = cohort[size:]
        return found

    def halve(self, clients: int) -> None:
        """From now on train half as many clients at once. RoloraError if it was one."""
        if clients == 1:
            raise RoloraError(
                "one client's step does not fit in memory: lower train.batch_size or "
                "data.max_length, or set train.recompute = true"
            )
        self.base.bank.most = clients // 2
        _log.warning(
            "%d clients at once do not fit in memory: continuing with %d", clients, clients // 2
        )

    def prepare(self, assigned: Assignment) -> Work:
        """The client's rows, and what it received overlaid with what it kept for itself."""
        info = assigned.info
        held = [self.shards[client] for client in (self.shards if info.members else [info.id])]
        taken = [self.shards[client] for client in info.members or [info.id]]
        steps = sum(self.settings.num_steps(len(rows)) for rows in taken)
        kept = self.store.read(info.id, before=info.round)
        moments = self._moments.read(info.id, info.round) if self.settings.kept else {}
        return Work(info.id, torch.cat(held), assigned.received | kept, steps, moments)

    def train(self, method: Method, job: Job, work: Sequence[Work]) -> list[Trained]:
        """Train one group through the bank."""
        return train_group(
            self.base,
            self.task,
            self.examples,
            work,
            method,
            self.settings,
            lr=job.lr,
            seed=job.seed,
            round=job.round,
        )

    def finish(self, method: Method, assigned: Assignment, trained: Trained) -> Update | Failure:
        """Keep what is personal, send what is shared."""
        info, received = assigned.info, assigned.received
        if self.settings.kept:
            self._moments.write(info.id, info.round, trained.moments)
        if personal := method.personal(info.round):
            self.store.write(info.id, info.round, trained.adapter.only(personal))
        counts = {"steps": float(trained.steps), "moved": float(trained.moved)}
        metrics = {"loss": trained.loss, **counts}
        sent = method.upload(received, trained.adapter, info).only(method.shared(info.round))
        update = Update(info.id, sent, info.num_examples, metrics)
        unchanged = self.up == "fp32" and not method.sparse_upload
        if self.up is None or unchanged or not method.federated:
            return update
        try:
            payload, arrived = encoded(self.up, method, assigned, sent, self.store)
        except WireError as error:
            return Failure(info.id, str(error))
        return replace(update, adapter=arrived, encoded_bytes=body_bytes(payload))

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterator[ClientMetrics]:
        """Each client's metrics; on the server's rows only if adapters are personal."""
        for assigned in clients:
            client, adapter = assigned.info.id, self.held_by(assigned)
            rows = self.held_out(client)
            held_out = {} if rows is None else evaluate(self.base, self.task, rows, adapter)
            server = self.evaluation(adapter) if method.personal_roles else Evaluation()
            yield ClientMetrics(client, held_out, server)

    def held_by(self, assigned: Assignment) -> AdapterState:
        """The client's adapter after the round in its ``info``."""
        kept = self.store.read(assigned.info.id, before=assigned.info.round + 1)
        return assigned.received | kept


def group_size(clients: int, most: int) -> int:
    """Clients in the next group, if groups of at most ``most`` are to be about equal."""
    return math.ceil(clients / math.ceil(clients / most))


def encoded(
    up: Format, method: Method, assigned: Assignment, sent: AdapterState, store: ClientStore
) -> tuple[bytes, AdapterState]:
    """The payload of an update, and what the server decodes from it.

    What rounding kept back stays in ``store`` until the client's next upload. Nothing is kept of
    factors that the server makes anew in each round. Raises WireError for values that are not
    finite.
    """
    client, round = assigned.info.id, assigned.info.round
    like, sparse = assigned.received.only(method.shared(round)), method.sparse_upload
    store = replace(store, kind="residual")
    residual = store.read(client, before=round)
    payload, kept = encode(up, sent, like, residual, sparse=sparse)
    arrived = decode(up, payload, like, sparse=sparse)
    if method.resets_factors:
        kept = {name: tensor for name, tensor in kept.items() if role_of(name) == "head"}
    if kept:
        store.write(client, round, residual | kept)
    return payload, AdapterState(arrived, assigned.received.scaling)


def starved(error: RuntimeError) -> bool:
    """Whether the error is that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


class Debug(InProcess):
    """Slow but explicit: one client at a time; names the client and the stage that broke."""

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """As ``InProcess.run``, with every stage of every client checked."""
        for assigned in job.cohort:
            client = assigned.info
            with _stage("prepare", client):
                work = self.prepare(assigned)
            with _stage("train", client):
                (trained,) = self.train(method, job, [work])
            with _stage("check", client):
                _check_frozen(method, job, work, trained)
            with _stage("finish", client):
                update = self.finish(method, assigned, trained)
            yield update


@contextlib.contextmanager
def _stage(stage: str, client: ClientInfo) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RoloraError(
            f"round {client.round}, client {client.id!r}, stage {stage!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_frozen(method: Method, job: Job, work: Work, trained: Trained) -> None:
    trainable = frozenset().union(*(method.trainable(job.round, s) for s in range(work.steps)))
    frozen = trained.adapter.select(lambda name: name not in trained.adapter.only(trainable))
    for name, tensor in frozen.items():
        if not torch.equal(tensor, work.start[name]):
            raise RuntimeError(f"frozen tensor {name} changed")
    for name, tensor in trained.adapter.items():
        if not torch.isfinite(tensor).all():
            raise RuntimeError(f"{name} has values that are not finite")
