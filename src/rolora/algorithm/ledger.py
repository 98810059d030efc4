"""What travels in a round, counted to the byte, and the ledger of what each client holds.

Up travels what a client sends, as it is encoded; the client works out what the server decodes and
holds that from then on. Down travels every tensor of its view that it does not hold as it now is:
in the steady state of an alternating method the other factor, averaged in the round before; to a
client that has missed rounds, both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, ClientInfo, Failure, Update, role_of
from rolora.algorithm.method import Method, ServerState


class Held(NamedTuple):
    """What a client holds: the server's tensors as they were after ``round``.

    If it ``sent`` an update in the round that followed, it holds its own values of what was shared
    then, and not the server's. ``last`` is the latest round in which an update of it arrived, 0 if
    none has: what it keeps for itself counts as of then.
    """

    round: int
    sent: bool
    last: int = 0


@dataclass(frozen=True)
class Ledger:
    """Which value of which tensor each client holds, as round numbers: nothing is hashed.

    ``changed``: tensor name -> the round in which the server's value last changed; none for a
    tensor as it was at the start. ``held``: client -> what it holds; none for one that has never
    taken part, so that it costs nothing.
    """

    changed: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, Held] = field(default_factory=dict)


@dataclass(frozen=True)
class Arrival:
    """What is remembered of an update once it has been used; ``lone`` if it was the only one."""

    client: str
    metrics: Mapping[str, float]
    num_bytes: int
    lone: AdapterState | None = None


def record_arrivals(
    replies: Iterable[Update | Failure], arrived: list[Arrival], lone: bool
) -> Iterator[Update | Failure]:
    """The replies, unchanged; ``arrived`` grows by a note of each update as it passes.

    ``lone`` says that the cohort is one client.
    """
    for reply in replies:
        if isinstance(reply, Update):
            sent = reply.adapter
            note = Arrival(reply.client, reply.metrics, reply.num_bytes(), sent if lone else None)
            arrived.append(note)
        yield reply


def after_round(
    method: Method,
    before: ServerState,
    after: ServerState,
    cohort: Mapping[str, ClientInfo],
    ledger: Ledger,
    arrived: Sequence[Arrival],
) -> tuple[Ledger, int]:
    """The ledger after this round, and the bytes that went down: only what a client lacked.

    A tensor that ``method.download`` made for one client has no round of its own, so it travels
    every time.
    """
    sent = {one.client for one in arrived}
    held, total = dict(ledger.held), 0
    known: dict[Held | None, int] = {}  # bytes that a client lacks of the server's own adapter
    for client, info in cohort.items():
        view, has = method.download(before, info), ledger.held.get(client)
        if view is not before.adapter:
            total += lacking(method, before, view, ledger, has).num_bytes()
        else:
            if has not in known:
                known[has] = lacking(method, before, view, ledger, has).num_bytes()
            total += known[has]
        last = has.last if has else 0
        if client in sent and after.round > before.round:
            last = after.round
        held[client] = Held(before.round, client in sent, last)
    for one in arrived:
        # the average of one client's update is what that client holds already
        if one.client in cohort and one.lone and _is_part(one.lone, after.adapter):
            held[one.client] = Held(after.round, False, after.round)
    return Ledger(_changed(before, after, ledger), held), total


def lacking(
    method: Method, server: ServerState, view: AdapterState, ledger: Ledger, has: Held | None
) -> AdapterState:
    """The part of a client's ``view`` of the server's adapter that it does not hold.

    ``has``: what the ledger says of this client, None for one that never took part.
    """

    def lacks(name: str) -> bool:
        if has is None or view[name] is not server.adapter.get(name):
            return True
        if ledger.changed.get(name, 0) > has.round:
            return True
        return has.sent and role_of(name) in method.shared(has.round + 1)

    return view.select(lacks)


def _changed(before: ServerState, after: ServerState, ledger: Ledger) -> Mapping[str, int]:
    moved = {
        name: after.round
        for name, tensor in after.adapter.items()
        if not _is_part({name: tensor}, before.adapter)
    }
    return {**ledger.changed, **moved}


def _is_part(part: Mapping[str, Tensor], whole: AdapterState) -> bool:
    """Whether each of these tensors is in ``whole``, bit for bit."""
    return all(
        name in whole and (tensor is whole[name] or torch.equal(tensor, whole[name]))
        for name, tensor in part.items()
    )
