"""The round loop: sample a cohort, run it, step, evaluate; a generator of finished rounds.

The caller records, checkpoints and displays what the generator yields, and the state in each result
is all that is needed to continue from it. Within a round it hears only of replies (``arrived``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from rolora.algorithm.adapter import AdapterState, Assignment, ClientInfo, Failure, Update
from rolora.algorithm.ledger import Arrival, Ledger, after_round, gradient_bytes
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.reduce import mean
from rolora.algorithm.seeding import generator
from rolora.algorithm.spectrum import layer_measures
from rolora.algorithm.step import Aggregation, step
from rolora.errors import ConfigError, NoQuorum
from rolora.training.engine import Engine, Evaluation, Job

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Best:
    """The best validated round so far: its number, its score, its adapter."""

    round: int
    value: float
    adapter: AdapterState


@dataclass(frozen=True)
class RunState:
    """What a run carries from round to round: the content of a checkpoint.

    ``ledger``: which tensors each client holds; ``stale``: evaluations since the best one;
    ``phases``: the latest validation after training these factors, whose mean is a round's score.
    """

    server: ServerState
    ledger: Ledger = field(default_factory=Ledger)
    best: Best | None = None
    stale: int = 0
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundResult:
    """One finished round (``advanced``), or one attempt without a quorum.

    Round 0 is the evaluation before any training. ``bytes_up`` and ``bytes_down`` are this round's
    payload over all clients, as it is encoded; those of round 0 are the gradients of all clients,
    if the method starts from them. ``recall``: see ``Evaluation``; ``layers``: see
    ``rolora.algorithm.spectrum``; ``rejected``, ``missing`` and ``cut``: see
    ``rolora.algorithm.step.RoundReport``. ``reason``: why an attempt has not advanced.
    """

    round: int
    attempt: int
    state: RunState
    factors: tuple[str, ...] = ()
    cohort: tuple[str, ...] = ()
    lr: float = 0.0
    clients: Mapping[str, Metrics] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    validation: Metrics = field(default_factory=dict)
    client_metrics: Mapping[str, Metrics] = field(default_factory=dict)
    recall: Metrics = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    aggregation_error: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    rejected: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    cut: Mapping[str, float] = field(default_factory=dict)
    advanced: bool = True
    reason: str = ""

    @property
    def loss(self) -> float | None:
        """Mean training loss, weighted by num_examples, of the clients that tell theirs."""
        told = [client for client in self.clients.values() if "loss" in client]
        weight = sum(client["num_examples"] for client in told)
        if not weight:
            return None
        return sum(client["loss"] * client["num_examples"] for client in told) / weight

    @property
    def moved(self) -> bool | None:
        """Whether training moved a tensor of any client; None if no client says.

        Nothing moves where no gradient arrives, for example behind a ReLU that is closed for all
        rows, or once a loss is 0.
        """
        counts = [client["moved"] for client in self.clients.values() if "moved" in client]
        return any(counts) if counts else None


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Everything that defines a run; nothing in it changes while it runs.

    ``lr`` maps a round to its learning rate, ``ranks`` clients to their LoRA ranks (None: all have
    the server's). ``seed`` is sent to the clients, whose batches and dropout follow from it;
    cohorts and the server's random draws follow from ``server_seed``, which is not sent (None: from
    ``seed``). ``evaluate`` measures an adapter on the server's rows; ``metric``
    is the validation metric that early stopping and the best round go by, as a mean over the phases
    of a method that trains different factors in turn. ``patience`` counts evaluations without
    improvement. ``spare`` clients are drawn beyond the cohort, for an engine that uses the first
    ones to answer. ``arrived`` is called with each reply of the engine as it comes.
    """

    method: Method
    engine: Engine
    rounds: int
    lr: Callable[[int], float]
    aggregation: Aggregation = field(default_factory=lambda: Aggregation(mean()))
    ranks: Callable[[Iterable[str]], Mapping[str, int]] | None = None
    seed: int = 0
    server_seed: int | None = None
    participation: float = 1.0
    metric: str = "accuracy"
    higher_is_better: bool = True
    evaluate: Callable[[AdapterState], Evaluation] = lambda adapter: Evaluation()
    per_client: bool = False
    eval_every: int = 5
    patience: int | None = None
    spare: int = 0
    max_attempts: int = 3
    arrived: Callable[[Update | Failure], None] = lambda reply: None

    @cached_property
    def evaluated_rounds(self) -> frozenset[int]:
        """The rounds whose results have metrics; see the function ``evaluated_rounds``."""
        return evaluated_rounds(self.method, self.rounds, self.eval_every)


def evaluated_rounds(method: Method, rounds: int, every: int) -> frozenset[int]:
    """Round 0, every n-th, and the last that trains each set of factors.

    So the final score of a method that alternates is a mean over its last rounds, whatever n.
    """
    last = {method.trained(round): round for round in range(1, rounds + 1)}
    return frozenset({0, *range(every, rounds + 1, every), *last.values()})


def cohort_size(clients: int, participation: float) -> int:
    """The number of clients in a cohort: the nearest whole number, at least one."""
    return min(clients, max(1, math.floor(participation * clients + 0.5)))


def sample_cohort(
    clients: Sequence[str],
    participation: float,
    seed: int,
    round: int,
    attempt: int,
    spare: int = 0,
    *,
    trusted: str | None = None,
) -> tuple[str, ...]:
    """The ids, in order, of a random share ``participation`` of the clients and ``spare`` more.

    Drawn without replacement; the number of spare clients does not change who else is drawn. The
    ``trusted`` client is always one of them.
    """
    rng = generator(seed, "cohort", round, attempt)
    size = cohort_size(len(clients), participation) + spare
    ids = sorted(clients)
    drawn = [ids[i] for i in torch.randperm(len(ids), generator=rng).tolist()]
    drawn.sort(key=lambda client: client != trusted)  # the others stay in the order of the draw
    return tuple(sorted(drawn[:size]))


def federate(run: Federation, state: RunState) -> Iterator[RoundResult]:
    """Run rounds until ``run.rounds`` are done or validation has stopped improving.

    An attempt below the quorum yields a result that has not ``advanced``, and the round is tried
    again with a new cohort. A caller that saves every yielded ``state`` before it asks for the next
    result can be killed at any moment and continue from the last one. Raises NoQuorum after
    ``run.max_attempts`` attempts at one round (a resumed run counts from 0) and ConfigError
    if validation does not measure ``run.metric``.

    A federation on your own model: an engine that knows the clients and trains a cohort.

    >>> import torch, rolora
    >>> class Mine:
    ...     def __init__(self, model, rows):
    ...         self.model, self.rows = model, rows
    ...         self.bank = rolora.attach(model, ["0"], ["2"], rank=2, scaling=2.0)
    ...     def clients(self):
    ...         return {name: len(y) for name, (x, y) in self.rows.items()}
    ...     def run(self, method, job):
    ...         for assigned in job.cohort:
    ...             x, y = self.rows[assigned.info.id]
    ...             self.bank.load([assigned.received])
    ...             leaves = self.bank.train(method.trainable(job.round, 0))
    ...             optimizer = torch.optim.SGD(leaves, job.lr)
    ...             for _ in range(20):
    ...                 optimizer.zero_grad()
    ...                 loss = torch.nn.functional.cross_entropy(self.model(x), y)
    ...                 loss.backward()
    ...                 optimizer.step()
    ...             sent = self.bank.take(0).only(method.shared(job.round))
    ...             yield rolora.Update(assigned.info.id, sent, len(y), {"loss": loss.item()})
    >>> rng = torch.Generator().manual_seed(0)
    >>> def rows(count):
    ...     x = torch.randn(count, 8, generator=rng)
    ...     return x, (x[:, 0] > 0).long()
    >>> layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
    >>> engine = Mine(torch.nn.Sequential(*layers), {"ann": rows(40), "bob": rows(20)})
    >>> method = rolora.get_method("rolora")
    >>> federation = rolora.Federation(method=method, engine=engine, rounds=6, lr=lambda round: 0.5)
    >>> start = rolora.ServerState(method.init(engine.bank.specs, rng))
    >>> results = list(rolora.federate(federation, rolora.RunState(start)))
    >>> [result.factors for result in results[1:4]]
    [('B', 'head'), ('A', 'head'), ('B', 'head')]
    >>> results[-1].loss < results[1].loss, results[-1].aggregation_error < 1e-6
    (True, True)
    """
    if state.server.round == 0 and state.server.attempt == 0:
        started = time.perf_counter()
        each = gradient_bytes(run.method, state.server.adapter)
        up = each * len(run.engine.clients()) if each else 0
        before = _evaluated(run, RoundResult(0, 0, state, bytes_up=up))
        yield replace(before, seconds=time.perf_counter() - started)
    failed, reason = 0, ""
    patience = math.inf if run.patience is None else run.patience
    while state.server.round < run.rounds and state.stale < patience:
        if failed == run.max_attempts:
            raise NoQuorum(
                f"round {state.server.round + 1}: no quorum of {run.aggregation.fewest} after "
                f"{run.max_attempts} attempts ({reason}); finished rounds are saved"
            )
        started = time.perf_counter()
        result = _round(run, state)
        failed, reason = (0 if result.advanced else failed + 1), result.reason
        if result.advanced:
            result = _evaluated(run, result)
        state = result.state
        yield replace(result, seconds=time.perf_counter() - started)


def _round(run: Federation, state: RunState) -> RoundResult:
    method, server = run.method, state.server
    round, attempt = server.round + 1, server.attempt
    clients = run.engine.clients()
    secret = run.seed if run.server_seed is None else run.server_seed
    aggregation = run.aggregation
    if not method.federated:
        aggregation = replace(aggregation, quorum=1, trusted=None)
    ids = sample_cohort(
        list(clients),
        run.participation,
        secret,
        round,
        attempt,
        run.spare,
        trusted=run.aggregation.trusted,
    )
    # largest shard first, then by id: clients with as many steps then share a bank, and their
    # updates come in the order of use
    order = sorted(ids, key=lambda id: (-clients[id], id))
    ranks = _ranks(run, server, clients)
    drawn = tuple(ClientInfo(id, clients[id], ranks[id], round) for id in order)
    cohort = {
        info.id: Assignment(info, method.download(server, info))
        for info in method.cohort(drawn, sum(clients.values()))
    }
    job = Job(server, tuple(cohort.values()), run.seed, run.lr(round), state.ledger)
    arrived: list[Arrival] = []

    def replies() -> Iterator[Update | Failure]:
        for reply in run.engine.run(method, job):
            run.arrived(reply)
            if isinstance(reply, Update):
                lone = reply.adapter if len(cohort) == 1 else None
                arrived.append(Arrival(reply.client, reply.metrics, reply.num_bytes(), lone))
            yield reply

    rng = generator(secret, "aggregate", round, attempt)
    after, report = step(method, aggregation, server, cohort, replies(), rng)
    ledger, bytes_up, bytes_down = state.ledger, 0, 0
    if method.federated:
        ledger, bytes_down = after_round(method, server, after, cohort, state.ledger, arrived)
        bytes_up = sum(one.num_bytes for one in arrived)
    return RoundResult(
        round=round,
        attempt=attempt,
        factors=tuple(sorted(method.trained(round))),
        cohort=ids,
        lr=job.lr,
        clients={
            one.client: {"num_examples": cohort[one.client].info.num_examples, **one.metrics}
            for one in reversed(arrived)  # the first of several counts
            if one.client in report.accepted
        },
        aggregation_error=report.aggregation_error,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        rejected=report.rejected,
        missing=report.missing,
        cut=report.cut,
        advanced=report.quorum_met,
        reason=report.reason,
        state=replace(state, server=after, ledger=ledger),
    )


def _evaluated(run: Federation, result: RoundResult) -> RoundResult:
    """The result with metrics, if its round is one to evaluate."""
    if result.round not in run.evaluated_rounds:
        return result
    state, first = result.state, result.round == 0
    client_metrics: dict[str, Metrics] = {}
    found = Evaluation()
    if run.per_client or (run.method.personal_roles and not first):
        each = list(run.engine.evaluate(run.method, _all_clients(run, state.server)))
        client_metrics = {one.client: one.held_out for one in each if one.held_out}
        found = Evaluation(
            _mean([one.server.metrics for one in each if one.server.metrics]),
            _mean([one.server.validation for one in each if one.server.validation]),
            _mean([one.server.recall for one in each if one.server.recall]),
        )
    if not found.metrics:
        found = run.evaluate(state.server.adapter)
    if found.validation and run.metric not in found.validation:
        known = ", ".join(found.validation)
        raise ConfigError(f"validation does not measure the metric {run.metric!r}; it has: {known}")
    if found.validation and not first:
        state = _track_best(run, state, found.validation)
    return replace(
        result,
        metrics=found.metrics,
        validation=found.validation,
        client_metrics=client_metrics,
        recall=found.recall,
        layers=layer_measures(state.server.adapter, run.method.personal_roles),
        state=state,
    )


def _ranks(run: Federation, server: ServerState, clients: Iterable[str]) -> Mapping[str, int]:
    if run.ranks is None:
        return dict.fromkeys(clients, server.adapter.rank)
    return run.ranks(clients)


def _all_clients(run: Federation, server: ServerState) -> Iterator[Assignment]:
    """Every client with the adapter that it would receive now."""
    clients = run.engine.clients()
    ranks = _ranks(run, server, clients)
    for client, count in sorted(clients.items()):
        info = ClientInfo(client, count, ranks[client], server.round)
        yield Assignment(info, run.method.download(server, info))


def _track_best(run: Federation, state: RunState, validation: Metrics) -> RunState:
    """By the mean over phases, as ``RunRecord.scores``: a phase that is validated on its good side
    alone would always win. So a round counts once all phases so far have been validated."""
    phases = ["+".join(sorted(run.method.trained(n + 1))) for n in range(state.server.round)]
    state = replace(state, phases={**state.phases, phases[-1]: validation[run.metric]})
    if set(phases) - state.phases.keys():
        return state
    value = sum(state.phases.values()) / len(state.phases)
    if state.best is None or _merit(run, value) > _merit(run, state.best.value):
        return replace(state, best=Best(state.server.round, value, state.server.adapter), stale=0)
    return replace(state, stale=state.stale + 1)


def _merit(run: Federation, value: float) -> float:
    """Larger is better; what is not finite is the worst."""
    if not math.isfinite(value):
        return -math.inf
    return value if run.higher_is_better else -value


def _mean(metrics: Sequence[Metrics]) -> Metrics:
    if not metrics:
        return {}
    return {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}
