"""What travels in a round, counted to the byte, and the ledger of what each client holds.

Up travels what a client sends, as it is encoded; the client works out what the server decodes and
holds that from then on. Down travels every tensor of its view whose hash it does not hold:
in the steady state of an alternating method the other factor, averaged in the round before; to a
client that has missed rounds, both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rolora.adapter import ClientInfo, Failure, Update
from rolora.method import Method, ServerState

Ledger = Mapping[str, Mapping[str, str]]  # client -> tensor name -> hash


@dataclass(frozen=True)
class Arrival:
    """What is remembered of an update once it has been used."""

    client: str
    metrics: Mapping[str, float]
    num_bytes: int
    hashes: Mapping[str, str]


def noting(
    replies: Iterable[Update | Failure], arrived: list[Arrival]
) -> Iterator[Update | Failure]:
    """The replies, unchanged; ``arrived`` grows by a note of each update as it passes."""
    for reply in replies:
        if isinstance(reply, Update):
            hashes = reply.adapter.hashes()
            arrived.append(Arrival(reply.client, reply.metrics, reply.num_bytes(), hashes))
        yield reply


def after_round(
    method: Method,
    server: ServerState,
    cohort: Mapping[str, ClientInfo],
    ledger: Ledger,
    arrived: Sequence[Arrival],
) -> tuple[Ledger, int]:
    """The ledger after this round, and the bytes that went down: only what a client lacked."""
    sent = {one.client: one.hashes for one in reversed(arrived)}  # the first of several counts
    held = dict(ledger)
    whole, whole_hashes = server.adapter, server.adapter.hashes()
    total = 0
    for client, info in cohort.items():
        view = method.download(server, info)
        hashes = whole_hashes if view is whole else view.hashes()
        before = ledger.get(client, {})
        lacking = [name for name, digest in hashes.items() if before.get(name) != digest]
        total += view.select(set(lacking).__contains__).num_bytes()
        held[client] = {**hashes, **sent.get(client, {})}
    return held, total
