"""The server's part of a round: check the updates, combine them, and report how exact that was.

Updates stream: each is checked, added to the reducer and to the exact mean of products, and
dropped, so a round's memory does not grow with its cohort.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from rolora.algorithm.adapter import AdapterState, Assignment, Failure, Update
from rolora.algorithm.exactness import AggregationError
from rolora.algorithm.growth import as_factors
from rolora.algorithm.method import Method, Project, ServerState
from rolora.algorithm.reduce import CLIENT_WEIGHTS, Memory, Reducer, Value

MOSTLY = 0.5  # a client that is cut by more than this counts as cut in a round


@dataclass(frozen=True)
class Aggregation:
    """How a run combines updates: the reducer, the clients' weights, and the quorum.

    ``exactness``: whether to compute the aggregation error.
    """

    reducer: Reducer
    weights: Literal["num_examples", "uniform"] = "num_examples"
    quorum: int = 1
    exactness: bool = True

    @property
    def fewest(self) -> int:
        """The fewest usable updates for a round to advance: the quorum, or what the rule needs."""
        return max(1, self.quorum, self.reducer.least)


@dataclass(frozen=True)
class RoundReport:
    """The outcome of ``step``: whose updates were used, whose were rejected and why.

    ``aggregation_error``: see ``rolora.algorithm.exactness.AggregationError``; None if it was not
    asked for, or if the server cannot know it because clients keep factors to themselves.
    ``cut``: by which share the reducer used less of a client's update than of an equal share, from
    0 (left out) to 1 (not used at all); only of rules that say so, and only clients that were cut.
    """

    accepted: tuple[str, ...]
    rejected: Mapping[str, str]
    aggregation_error: float | None
    quorum_met: bool
    cut: Mapping[str, float] = field(default_factory=dict)


class _BelowQuorum(Exception):
    """Too few usable updates: the round does not advance."""


def step(
    method: Method,
    aggregation: Aggregation,
    server: ServerState,
    cohort: Mapping[str, Assignment],
    replies: Iterable[Update | Failure],
    rng: torch.Generator,
) -> tuple[ServerState, RoundReport]:
    """Check the updates of a round, combine the good ones, and return the next server state.

    ``cohort``: client -> its assignment; updates are combined in this order, in whatever order they
    arrive. A faulty update is rejected with a reason and stops nothing; of several from one client
    the first counts. Below the quorum, or with fewer updates than the reducer needs, the round does
    not advance: the same state comes back with ``attempt + 1``. ``rng`` is what the reducer and the
    method draw from.
    """
    round = server.round + 1
    accepted: list[str] = []
    rejected: dict[str, str] = {}
    kept: list[Memory] = []
    cut: dict[str, float] = {}
    known = aggregation.exactness and not method.personal(round)
    missed = AggregationError(server.adapter) if known else None

    def reduce(
        project: Project | None = None, weight: Callable[[Update], float] | None = None
    ) -> Value:
        if kept:
            raise RuntimeError(f"method {method.name!r} called reduce twice in one round")
        into = project or (lambda view: view.only(method.shared(round)))
        reducer, memory = aggregation.reducer, server.memory or aggregation.reducer.init()
        for update in _in_turn(replies, cohort, rejected):
            assigned = cohort[update.client]
            if fault := _fault(method, assigned, update):
                rejected[update.client] = fault
                continue
            accepted.append(update.client)
            received = assigned.received
            returned = received | update.adapter
            share = 1.0 if aggregation.weights == "uniform" else float(update.num_examples)
            if weight is not None:  # with the server's scaling: the client's is not trusted
                sent = AdapterState(update.adapter, received.scaling)
                share = weight(replace(update, adapter=sent))
            if missed is not None:
                missed.add(received, returned, share)
            value, reference = into(returned), received | into(received)
            memory = reducer.add(memory, value, reference, share)
        if len(accepted) < aggregation.fewest:
            raise _BelowQuorum
        reduced, memory = reducer.finish(memory, rng)
        if (weights := memory.get(CLIENT_WEIGHTS)) is not None:
            cut.update(_cut(accepted, weights) if reduced else {})  # nothing shared, nothing cut
            memory = {name: kept for name, kept in memory.items() if name != CLIENT_WEIGHTS}
        if odd := [name for name, kept in memory.items() if not isinstance(kept, torch.Tensor)]:
            raise TypeError(f"the reducer keeps {odd[0]!r}, which is not a tensor")
        kept.append(memory)
        return reduced

    try:
        after = method.aggregate(server, reduce, rng)
    except _BelowQuorum:
        stalled = replace(server, attempt=server.attempt + 1)
        return stalled, RoundReport(tuple(accepted), rejected, None, quorum_met=False)
    if not kept:
        raise RuntimeError(f"method {method.name!r} did not call reduce")
    rank = sum(cohort[client].info.rank for client in accepted)
    adapter, growth = as_factors(server.adapter, after.adapter, rank, rng)
    after = replace(after, adapter=adapter, memory=kept[0], round=round, attempt=0, growth=growth)
    error = None if missed is None else missed.of(adapter)
    return after, RoundReport(tuple(accepted), rejected, error, quorum_met=True, cut=cut)


def _cut(accepted: Sequence[str], weights: torch.Tensor) -> dict[str, float]:
    """Client -> by how much its weight is below 1 / clients, as a share, to four decimals."""
    if weights.shape != (len(accepted),):
        raise TypeError(
            f"the reducer's {CLIENT_WEIGHTS!r} have shape {tuple(weights.shape)}, but "
            f"{len(accepted)} clients were reduced"
        )
    shares = (1 - weights.double() * len(accepted)).clamp_min(0).tolist()
    return {
        client: round(share, 4)
        for client, share in zip(accepted, shares, strict=True)
        if share >= 5e-5
    }


def _in_turn(
    replies: Iterable[Update | Failure], cohort: Mapping[str, Assignment], rejected: dict[str, str]
) -> Iterator[Update]:
    """The updates in the order of ``cohort``; an early one waits for its turn.

    Each is yielded as soon as all before it have arrived or failed, and is not kept after that.
    """
    came: set[str] = set()
    waiting: dict[str, Update] = {}
    turns = deque(cohort)
    for reply in replies:
        if reply.client not in cohort:
            rejected[reply.client] = "not in this round's cohort"
        elif reply.client in came:
            rejected[reply.client] = "sent more than one update; the first counts"
        else:
            came.add(reply.client)
            if isinstance(reply, Failure):
                rejected[reply.client] = reply.reason
            else:
                waiting[reply.client] = reply
        while turns and turns[0] in came:
            client = turns.popleft()
            if client in waiting:
                yield waiting.pop(client)
    yield from (waiting[client] for client in turns if client in waiting)


def _fault(method: Method, assigned: Assignment, update: Update) -> str | None:
    """Why this update cannot be used, as text for the record, or None."""
    info = assigned.info
    if type(update.num_examples) is not int or update.num_examples != info.num_examples:
        return f"num_examples is {update.num_examples!r}, but it joined with {info.num_examples}"
    expected = assigned.received.only(method.shared(info.round))
    if missing := sorted(expected.keys() - update.adapter.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(update.adapter.keys() - expected.keys()):
        return f"{extra[0]} was not asked for"
    for name, tensor in update.adapter.items():
        like = expected[name]
        if tensor.shape != like.shape:
            return f"{name} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}"
        if tensor.dtype != like.dtype:
            return f"{name} has dtype {tensor.dtype}, expected {like.dtype}"
        # one pass: only finite values have a finite sum; if they overflowed, look again
        if not math.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
            return f"{name} has values that are not finite"
    return None
