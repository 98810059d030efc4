"""Who runs a cohort: the seam between the round loop and the machines that train.

``InProcess`` trains many clients at once on one base model; ``Debug`` trains them one at a time and
says in which stage which client broke.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Failure, Update, role_of
from rolora.algorithm.codec import Format, WireError, body_bytes, decode, encode
from rolora.algorithm.ledger import Ledger
from rolora.algorithm.method import Method, ServerState
from rolora.data.examples import Examples
from rolora.errors import RoloraError
from rolora.model.base import Base
from rolora.tasks.registry import Task
from rolora.training.client_store import ClientStore
from rolora.training.local import LocalSettings, Trained, Work, evaluate, train_group

_log = logging.getLogger(__name__)

POOL = "(all)"  # the client id of a pooled method; brackets, as no client's own id has them


@dataclass(frozen=True)
class Job:
    """One round's work: the server's state, the cohort in order of use, the seed, the step size.

    ``ledger`` says what each client holds, for an engine that has to send what it lacks.
    """

    server: ServerState
    cohort: tuple[ClientInfo, ...]
    seed: int
    lr: float
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def round(self) -> int:
        """The round being run, from 1."""
        return self.server.round + 1


@dataclass(frozen=True)
class ClientMetrics:
    """One client's metrics on its own held-out rows and, for personal adapters, on the server's."""

    client: str
    held_out: Mapping[str, float]
    test: Mapping[str, float]
    validation: Mapping[str, float]


class Engine(Protocol):
    """Knows the clients, runs those of a round, and evaluates where personal state is."""

    def clients(self) -> Mapping[str, int]:
        """Who can take part now: id -> num_examples."""
        ...

    def run(self, method: Method, job: Job) -> Iterable[Update | Failure]:
        """Train the job's cohort; yield what each client sends, in any order."""
        ...

    def evaluate(
        self, method: Method, server: ServerState, clients: Sequence[ClientInfo]
    ) -> Iterable[ClientMetrics]:
        """Evaluate each client's adapter on its own held-out rows."""
        ...


@dataclass(frozen=True)
class InProcess:
    """Trains ``bank_size`` clients at a time on one base model in this process.

    ``shards`` maps client -> row indices into ``examples``; ``held_out`` client -> rows that it
    never trains on. The result does not depend on ``bank_size`` beyond floating-point rounding.
    ``up`` is how uploads travel; other than fp32, each is encoded and decoded as it would be.
    """

    base: Base
    task: Task
    examples: Examples
    shards: Mapping[str, Tensor]
    settings: LocalSettings
    store: ClientStore
    bank_size: int = 16
    held_out: Mapping[str, Examples] = field(default_factory=dict)
    test: Examples | None = None
    validation: Examples | None = None
    up: Format = "fp32"

    def clients(self) -> Mapping[str, int]:
        """Every client, always."""
        return {client: len(rows) for client, rows in self.shards.items()}

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """Train the cohort in its order, in groups of like size.

        A group that does not fit in memory is halved, and so are all groups after it.
        """
        cohort = (pooled(job.cohort, self.shards),) if method.pooled else job.cohort
        first = 0
        while first < len(cohort):
            left, most = len(cohort) - first, self.base.bank.most or self.bank_size
            size = group_size(left, min(self.bank_size, most))
            clients = cohort[first : first + size]
            work = [self.prepare(method, job, client) for client in clients]
            try:
                group = self.train(method, job, work)
            except RuntimeError as error:
                self.base.bank.most = _half(len(clients), error)
                continue
            for client, trained in zip(clients, group, strict=True):
                yield self.finish(method, job, client, trained)
            first += size

    def num_steps(self, client: ClientInfo, job: Job) -> int:
        """Optimiser steps of this client in this round; a pooled client takes the cohort's."""
        if client.id == POOL:
            return sum(self.settings.num_steps(member.num_examples) for member in job.cohort)
        return self.settings.num_steps(client.num_examples)

    def prepare(self, method: Method, job: Job, client: ClientInfo) -> Work:
        """What the client received overlaid with what it kept for itself, and its rows."""
        kept = self.store.read(client.id, before=job.round)
        rows = (
            torch.cat(list(self.shards.values())) if client.id == POOL else self.shards[client.id]
        )
        start = method.download(job.server, client) | kept
        return Work(client.id, rows, start, self.num_steps(client, job))

    def train(self, method: Method, job: Job, work: Sequence[Work]) -> list[Trained]:
        """One group through the bank."""
        return train_group(
            self.base,
            self.task,
            self.examples,
            work,
            lambda step: method.trainable(job.round, step),
            self.settings,
            lr=job.lr,
            seed=job.seed,
            round=job.round,
            gradient=method.gradient,
            penalty=method.penalty,
        )

    def finish(
        self, method: Method, job: Job, client: ClientInfo, trained: Trained
    ) -> Update | Failure:
        """Keep what is personal, send what is shared."""
        if personal := method.personal(job.round):
            self.store.write(client.id, job.round, trained.adapter.only(personal))
        metrics = {"loss": trained.loss, "steps": float(trained.steps)}
        shared = method.shared(job.round)
        received = method.download(job.server, client)
        sent = method.upload(received, trained.adapter, client).only(shared)
        update = Update(client.id, sent, client.num_examples, metrics)
        if method.pooled or (self.up == "fp32" and not method.sparse):
            return update
        try:
            payload = packed(self.up, method, update, received, self.store, job.round)
            arrived = decode(self.up, payload, received.only(shared), sparse=method.sparse)
        except WireError as error:
            return Failure(client.id, str(error))
        return replace(update, adapter=sent | arrived, encoded_bytes=body_bytes(payload))

    def evaluate(
        self, method: Method, server: ServerState, clients: Sequence[ClientInfo]
    ) -> Iterator[ClientMetrics]:
        """Every client's metrics; on the server's rows only where adapters are personal."""

        def measured(rows: Examples | None) -> Mapping[str, float]:
            return {} if rows is None else evaluate(self.base, self.task, rows, adapter)

        test, validation = (self.test, self.validation) if method.kept else (None, None)
        for client in clients:
            kept = self.store.read(client.id, before=server.round + 1)
            adapter = method.download(server, client) | kept
            own = self.held_out.get(client.id)
            yield ClientMetrics(client.id, measured(own), measured(test), measured(validation))


def group_size(clients: int, most: int) -> int:
    """Clients of the next group, where groups of at most ``most`` are to be of like size."""
    return math.ceil(clients / math.ceil(clients / most))


def packed(
    up: Format,
    method: Method,
    update: Update,
    received: AdapterState,
    store: ClientStore,
    round: int,
) -> bytes:
    """The payload of an update. What rounding kept back of it stays in ``store``, with the client.

    Factors that the server makes anew are not those of the last upload: nothing is kept of them.
    """
    store = replace(store, kind="residual")
    like = received.only(method.shared(round))
    residual = AdapterState(store.read(update.client, before=round), {})
    payload, kept = encode(up, update.adapter, like, residual, sparse=method.sparse)
    if method.rebased:
        kept = {name: tensor for name, tensor in kept.items() if role_of(name) == "head"}
    if kept:
        store.write(update.client, round, residual | kept)
    return payload


def pooled(cohort: Sequence[ClientInfo], shards: Mapping[str, Tensor]) -> ClientInfo:
    """The one client of a pooled method: it holds every client's rows."""
    total = sum(len(rows) for rows in shards.values())
    return replace(cohort[0], id=POOL, num_examples=total)


def _half(clients: int, error: RuntimeError) -> int:
    """Half as many clients, if it was memory that ran out and there is a half."""
    starved = isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
    if not starved:
        raise error
    if clients == 1:
        raise RoloraError(
            "one client's step does not fit in memory: lower train.batch_size or data.max_length, "
            "or set train.recompute = true"
        ) from error
    _log.warning("%d clients at once do not fit in memory: going on with %d", clients, clients // 2)
    return clients // 2


@dataclass(frozen=True)
class Debug:
    """Slow and plain-spoken: one client at a time; names the client and the stage that broke."""

    engine: InProcess

    def clients(self) -> Mapping[str, int]:
        """As ``InProcess.clients``."""
        return self.engine.clients()

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """As ``InProcess.run``, with every stage of every client checked by itself."""
        engine = self.engine
        cohort = (pooled(job.cohort, engine.shards),) if method.pooled else job.cohort
        for client in cohort:
            with _stage("prepare", client, job):
                work = engine.prepare(method, job, client)
            with _stage("train", client, job):
                (trained,) = engine.train(method, job, [work])
            with _stage("check", client, job):
                _check_frozen(method, job, work, trained)
            with _stage("finish", client, job):
                update = engine.finish(method, job, client, trained)
            yield update

    def evaluate(
        self, method: Method, server: ServerState, clients: Sequence[ClientInfo]
    ) -> Iterator[ClientMetrics]:
        """As ``InProcess.evaluate``."""
        return self.engine.evaluate(method, server, clients)


@contextlib.contextmanager
def _stage(stage: str, client: ClientInfo, job: Job) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RoloraError(
            f"round {job.round}, client {client.id!r}, stage {stage!r}: "
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
