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

from rolora.algorithm.adapter import LARGEST, AdapterState, Assignment, Failure, Update, too_large
from rolora.algorithm.exactness import AggregationError
from rolora.algorithm.method import Method, Project, Reduce, ServerState
from rolora.algorithm.patches import as_factors
from rolora.algorithm.reduce import CLIENT_WEIGHTS, Memory, Reducer, Value
from rolora.errors import ConfigError

# what torch raises where it is asked for the singular values of what is not finite
LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
MOST_ROWS = 2**53  # whole numbers below it are exact as floats
# The largest value of a server's state. A product of two of the clients' largest values, times any
# rank and scaling, stays below it, and its square is finite in float32.
LARGEST_KEPT = LARGEST**3


@dataclass(frozen=True)
class Aggregation:
    """How a run combines updates: the reducer, the clients' weights, and the quorum.

    ``exactness``: whether to compute the aggregation error. ``max_share``: the largest share of a
    round's weight that one client may have (see ``capped``); with it, a round's updates are all
    kept until the last has come. ``trusted``: the client that comes first in every round, and
    without whose update none advances; a reducer that is ``trusting`` judges the others by it.
    ConfigError if such a reducer has no client to trust.
    """

    reducer: Reducer
    weights: Literal["num_examples", "uniform"] = "num_examples"
    quorum: int = 1
    exactness: bool = True
    max_share: float | None = None
    trusted: str | None = None

    def __post_init__(self) -> None:
        if self.reducer.trusting and self.trusted is None:
            raise ConfigError(
                "aggregate.trusted is missing: this reducer judges updates by that of one client, "
                "so name a client that you run yourself"
            )

    @property
    def fewest(self) -> int:
        """The fewest usable updates for a round to advance: the quorum, or what the rule needs."""
        return max(1, self.quorum, self.reducer.least)


@dataclass(frozen=True)
class RoundReport:
    """The outcome of ``step``: whose updates were used, whose were rejected or missing, and why.

    ``aggregation_error``: see ``rolora.algorithm.exactness.AggregationError``; None if it was not
    asked for, or if the server cannot know it because clients keep factors to themselves.
    ``cut``: by which share the reducer used less of a client's update than of an equal share, from
    0 (left out) to 1 (not used at all); only of rules that say so, and only clients that were cut.
    ``quorum_met``: whether the round advanced; if not, ``reason`` says why.
    """

    accepted: tuple[str, ...]
    rejected: Mapping[str, str]
    aggregation_error: float | None
    quorum_met: bool
    missing: Mapping[str, str] = field(default_factory=dict)
    cut: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


class _BelowQuorum(Exception):
    """The updates, or what came of them, cannot be used: the round does not advance."""


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
    arrive, but the trusted client's first. A faulty update is rejected with a reason and stops
    nothing; of several from one client the first counts. Below the quorum, with fewer updates than
    the reducer needs, or without the trusted client's, the round does not advance: the same state
    comes back with ``attempt + 1``. So it does if the next state would not be sound (see
    ``_unsound``). ``rng`` is what the reducer and the method draw from.
    """
    round, trusted = server.round + 1, aggregation.trusted
    if trusted is not None and trusted in cohort:
        cohort = {trusted: cohort[trusted], **cohort}
    accepted: list[str] = []
    rejected: dict[str, str] = {}
    missing: dict[str, str] = {}
    kept: list[Memory] = []
    cut: dict[str, float] = {}
    known = aggregation.exactness and not method.personal(round)
    missed = AggregationError(server.adapter) if known else None

    def weighed(weight: Callable[[Update], float] | None) -> Iterator[tuple[Update, float]]:
        for update in _in_turn(replies, cohort, rejected, missing):
            assigned = cohort[update.client]
            if fault := _fault(method, assigned, update):
                rejected[update.client] = fault
                continue
            accepted.append(update.client)
            share = 1.0 if aggregation.weights == "uniform" else float(update.num_examples)
            if weight is not None:  # with the server's scaling: the client's is not trusted
                sent = AdapterState(update.adapter, assigned.received.scaling)
                share = weight(replace(update, adapter=sent))
            yield update, share

    def combine(project: Project | None, weight: Callable[[Update], float] | None) -> Value:
        if kept:
            raise RuntimeError(f"method {method.name!r} called reduce twice in one round")
        into = project or (lambda view: view.only(method.shared(round)))
        reducer, memory = aggregation.reducer, server.memory or aggregation.reducer.init()
        total = 0.0
        for update, share in _shared_out(weighed(weight), aggregation.max_share):
            received = cohort[update.client].received
            returned = received | update.adapter
            if missed is not None:
                missed.add(received, returned, share)
            value, reference = into(returned), received | into(received)
            memory = reducer.add(memory, value, reference, share)
            total += share
        if trusted is not None and trusted not in accepted:
            absent = "it did not answer" if trusted in cohort else "it is not in the cohort"
            raise _BelowQuorum(
                f"no usable update of {trusted}, the trusted client: "
                f"{(missing | rejected).get(trusted, absent)}"
            )
        if len(accepted) < aggregation.fewest:
            raise _BelowQuorum(
                f"{len(accepted)} usable updates, and a round needs {aggregation.fewest}"
            )
        if not 0 < total < math.inf:
            raise _BelowQuorum(f"the weights of the clients sum to {total}")
        reduced, memory = reducer.finish(memory, rng)
        if (weights := memory.get(CLIENT_WEIGHTS)) is not None:
            cut.update(_cut(accepted, weights) if reduced else {})  # nothing shared, nothing cut
            memory = {name: kept for name, kept in memory.items() if name != CLIENT_WEIGHTS}
        if odd := [name for name, kept in memory.items() if not isinstance(kept, torch.Tensor)]:
            raise TypeError(f"the reducer keeps {odd[0]!r}, which is not a tensor")
        kept.append(memory)
        return reduced

    ranks = tuple(sorted({assigned.info.rank for assigned in cohort.values()}))
    try:
        after = method.aggregate(replace(server, patches={}), Reduce(combine, ranks), rng)
        if not kept:
            raise RuntimeError(f"method {method.name!r} did not call reduce")
        rank = sum(cohort[client].info.rank for client in accepted)
        adapter, growth = as_factors(server.adapter, after.adapter, rank, rng)
        after = replace(
            after,
            adapter=adapter,
            memory=kept[0],
            round=round,
            attempt=0,
            patches={**after.patches, **growth},
        )
        if fault := _unsound(after):
            raise _BelowQuorum(fault)
        error = None if missed is None else missed.of(adapter)
    except (_BelowQuorum, LinAlgError) as refusal:
        stalled = replace(server, attempt=server.attempt + 1)
        return stalled, RoundReport(
            tuple(accepted), rejected, None, quorum_met=False, missing=missing, reason=str(refusal)
        )
    return after, RoundReport(
        tuple(accepted), rejected, error, quorum_met=True, missing=missing, cut=cut
    )


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


def _unsound(after: ServerState) -> str:
    """Why this state may not become the server's; "" if it may.

    Every state passes here before it is committed: all that it holds is finite, and no value of the
    adapter is beyond ``LARGEST_KEPT``.
    """
    for what, tensors in (("memory", after.memory), ("patches", after.patches)):
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                return f"the server's {what} {name} would not be finite"
    for name, tensor in after.adapter.items():
        if too_large(tensor, LARGEST_KEPT):
            return f"{name} would not be finite, or beyond {LARGEST_KEPT:g}"
    return ""


def _shared_out(
    weighed: Iterable[tuple[Update, float]], most: float | None
) -> Iterable[tuple[Update, float]]:
    """The updates with no weight above the share ``most``; as they come if there is no such."""
    if most is None:
        return weighed
    pairs = list(weighed)
    shares = capped([share for _, share in pairs], most)
    return zip((update for update, _ in pairs), shares, strict=True)


def capped(weights: Sequence[float], most: float) -> list[float]:
    """The weights, with those above a share ``most`` of their new sum lowered to it.

    Where so few clients cannot all be below it, because ``most`` times their number is less than 1,
    they weigh the same. The order of the weights does not matter.
    """
    if not weights or most * len(weights) <= 1:
        return [1.0] * len(weights)
    falling = sorted(weights, reverse=True)
    for count, largest in enumerate(falling):  # the first ``count`` are lowered
        level = most * math.fsum(falling[count:]) / (1 - count * most)
        if largest <= level:
            return [min(weight, level) if count else weight for weight in weights]
    return [1.0] * len(weights)


def _in_turn(
    replies: Iterable[Update | Failure],
    cohort: Mapping[str, Assignment],
    rejected: dict[str, str],
    missing: dict[str, str],
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
                (missing if reply.missing else rejected)[reply.client] = reply.reason
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
    if not 0 < update.num_examples < MOST_ROWS:
        return f"num_examples is {update.num_examples}; a client has 1 to 2^53 - 1 rows"
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
        if too_large(tensor):
            return f"{name} has values that are not finite, or beyond {LARGEST:g}"
    return None
