"""The server's part of a round: check what clients sent, combine it, say how exact that was.

Updates stream through: each is checked, added to the reducer and to the exact mean of products,
and dropped, so that the memory of a round does not grow with its cohort.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rolora.algorithm.adapter import AdapterState, ClientInfo, Failure, Update
from rolora.algorithm.exactness import AggregationError
from rolora.algorithm.method import Method, Project, ServerState
from rolora.algorithm.reduce import Memory, Reducer, Value


@dataclass(frozen=True)
class Aggregation:
    """How a run combines updates: the reducer, the clients' weights, and the quorum.

    ``exactness`` says whether to find the aggregation error.
    """

    reducer: Reducer
    weights: Literal["num_examples", "uniform"] = "num_examples"
    quorum: int = 1
    exactness: bool = True

    def weight(self, client: Update | ClientInfo) -> float:
        """The client's weight in a mean; weights need not sum to 1."""
        return float(client.num_examples) if self.weights == "num_examples" else 1.0


@dataclass(frozen=True)
class RoundReport:
    """What ``step`` found: who was used, who was rejected and why, and how exact the average was.

    ``aggregation_error`` is that of ``products.AggregationError``; ``None`` where the server cannot
    know it (personal factors), or was not asked to.
    """

    accepted: tuple[str, ...]
    rejected: Mapping[str, str]
    aggregation_error: float | None
    quorum_met: bool


class _BelowQuorum(Exception):
    """Too few usable updates: the round does not advance."""


def step(
    method: Method,
    aggregation: Aggregation,
    server: ServerState,
    cohort: Mapping[str, ClientInfo],
    replies: Iterable[Update | Failure],
    rng: torch.Generator,
) -> tuple[ServerState, RoundReport]:
    """Check the updates of a round, combine the good ones, and return the next server state.

    Replies are taken in the order of ``cohort``, whatever order they arrive in. A faulty update is
    rejected and named, never fatal; of several from one client the first counts. Below the quorum
    the round does not advance: the same state comes back with ``attempt + 1``.
    """
    round = server.round + 1
    accepted: list[str] = []
    rejected: dict[str, str] = {}
    kept: list[Memory] = []
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
            received = method.download(server, cohort[update.client])
            if fault := _fault(method, received, cohort[update.client], update):
                rejected[update.client] = fault
                continue
            accepted.append(update.client)
            returned, share = received | update.adapter, aggregation.weight(update)
            if missed is not None:
                missed.add(received, returned, share)
            value, reference = into(returned), into(received)
            if weight is not None:  # by the server's own scaling
                sent = AdapterState(update.adapter, received.scaling)
                share = weight(replace(update, adapter=sent))
            memory = reducer.add(memory, value, reference, share)
        if len(accepted) < max(1, aggregation.quorum):
            raise _BelowQuorum
        reduced, memory = reducer.finish(memory, rng)
        kept.append(memory)
        return reduced

    try:
        after = method.aggregate(server, reduce, rng)
    except _BelowQuorum:
        stalled = replace(server, attempt=server.attempt + 1)
        return stalled, RoundReport(tuple(accepted), rejected, None, quorum_met=False)
    if not kept:
        raise RuntimeError(f"method {method.name!r} did not call reduce")
    after = replace(after, memory=kept[0], round=round, attempt=0)
    error = None if missed is None else missed.of(after.adapter)
    return after, RoundReport(tuple(accepted), rejected, error, quorum_met=True)


def _in_turn(
    replies: Iterable[Update | Failure], cohort: Mapping[str, ClientInfo], rejected: dict[str, str]
) -> Iterator[Update]:
    """The updates in the order of ``cohort``; one that comes before its turn waits for it.

    Each is handed on as soon as all before it have come or failed, and is not held after that.
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


def _fault(method: Method, received: AdapterState, info: ClientInfo, update: Update) -> str | None:
    """Why this update cannot be used, in words for the record, or ``None``."""
    if type(update.num_examples) is not int or update.num_examples != info.num_examples:
        return f"num_examples is {update.num_examples!r}, but it joined with {info.num_examples}"
    expected = received.only(method.shared(info.round))
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
        # one pass: a sum is finite only if all values are; where finite ones overflowed, look again
        if not math.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
            return f"{name} has values that are not finite"
    return None
