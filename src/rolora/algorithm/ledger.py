"""What travels in a round, counted to the byte, and which tensors each client holds.

A client sends its encoded update and, before the first round, a gradient if the method starts from
one. It receives every tensor that it should have and does not hold: in the steady state of an
alternating method the other factor, which was averaged in the round before; after missing rounds,
both factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rolora.algorithm.adapter import AdapterState, Assignment, role_of
from rolora.algorithm.method import Method, ServerState
from rolora.algorithm.patches import patched


class Held(NamedTuple):
    """What a client holds: the server's tensors as they were after ``round``.

    If it ``sent`` an update in the round that followed, it holds the values that it sent (as the
    server decoded them) in place of the server's. ``last`` is the latest round in which an update
    of this client arrived, 0 if there is none: its personal tensors are as of that round.
    """

    round: int
    sent: bool
    last: int = 0


@dataclass(frozen=True)
class Ledger:
    """Which version of which tensor each client holds, as round numbers; nothing is hashed.

    ``changed``: tensor name -> the round in which the server's value last changed; tensors that
    never changed are left out. ``held``: client -> what it holds; clients that never took part are
    left out, so they cost nothing.
    """

    changed: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, Held] = field(default_factory=dict)


@dataclass(frozen=True)
class Arrival:
    """What is remembered of an update once it has been used.

    ``lone``: what it sent, if its client was the whole cohort.
    """

    client: str
    metrics: Mapping[str, float]
    num_bytes: int
    lone: AdapterState | None = None


def gradient_bytes(method: Method, start: AdapterState) -> int:
    """What each client sends before the first round: its gradient (out, in) of every layer, if the
    method starts from one, in float32."""
    if not method.needs_gradient:
        return 0
    factors = [(start[f"{x}.lora_B.weight"], start[f"{x}.lora_A.weight"]) for x in start.layers()]
    return sum(4 * up.shape[0] * down.shape[1] for up, down in factors)


def after_round(
    method: Method,
    before: ServerState,
    after: ServerState,
    cohort: Mapping[str, Assignment],
    ledger: Ledger,
    arrived: Sequence[Arrival],
) -> tuple[Ledger, int]:
    """The ledger after this round, and the bytes that travelled down in it.

    A tensor that ``method.download`` made for one client has no version, so it travels every time.
    """
    sent = {one.client for one in arrived}
    held, total = dict(ledger.held), 0
    for client, assigned in cohort.items():
        has = ledger.held.get(client)
        total += lacking(method, before, assigned.received, ledger, has).num_bytes()
        last = has.last if has else 0
        if client in sent and after.round > before.round:
            last = after.round
        held[client] = Held(before.round, client in sent, last)
    for one in arrived:
        # the average of one client's update is what that client holds already
        if (
            one.client in cohort
            and one.lone
            and all(after.adapter.holds(name, tensor) for name, tensor in one.lone.items())
        ):
            held[one.client] = Held(after.round, False, after.round)
    moved = after.adapter.select(lambda name: not before.adapter.holds(name, after.adapter[name]))
    return Ledger({**ledger.changed, **dict.fromkeys(moved, after.round)}, held), total


def lacking(
    method: Method, server: ServerState, view: AdapterState, ledger: Ledger, has: Held | None
) -> AdapterState:
    """The tensors of ``view``, the adapter that a client should have, that it does not hold.

    ``has``: the ledger's entry for this client, None if it never took part. For a client that
    holds the adapter of the round before, a tensor that has a patch is replaced by it.
    """

    def lacks(name: str) -> bool:
        if has is None or not server.adapter.holds(name, view[name]):
            return True
        if ledger.changed.get(name, 0) > has.round:
            return True
        return has.sent and role_of(name) in method.shared(has.round + 1)

    lacked = view.select(lacks)
    previous = has is not None and has.round == server.round - 1
    return patched(lacked, server.patches) if previous else lacked
