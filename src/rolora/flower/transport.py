"""Parcels in Flower's messages, and Flower's grid as the engine's carrier."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from rolora.flower.membership import Lost
from rolora.flower.message import Parcel

KINDS = {"hello": "query", "ready": "query", "train": "train", "score": "evaluate"}
BODY = "body"
ERRORS = {
    ErrorCode.MESSAGE_UNAVAILABLE: "no answer within the time that it had",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "no answer within the time that it had",
    ErrorCode.NODE_UNAVAILABLE: "it has gone: it signed off, or gave no sign of life for a minute",
}
LONGEST = 0.5  # seconds between looks for answers


def packed(parcel: Parcel) -> RecordDict:
    """A parcel as the content of a Flower message."""
    return RecordDict({"rolora": ConfigRecord({**parcel.head, BODY: parcel.body})})


def unpacked(content: RecordDict) -> Parcel:
    """The parcel in a message's content; an empty one if there is none. Nothing is checked."""
    record = content.config_records.get("rolora", ConfigRecord())
    head = {k: v for k, v in record.items() if isinstance(v, str | int | float | bool)}
    body = record.get(BODY, b"")
    return Parcel(head, body if isinstance(body, bytes) else b"")


def pause(waited: float, longest: float) -> float:
    """Seconds until the next look for a message, after waiting so many for it.

    A look costs a kilobyte on the wire, so the pause grows; a message is late by it at most, which
    is a tenth of the waiting, or 0.2 s.
    """
    return min(max(waited / 10, 0.2), longest)


class GridCarrier:
    """Flower's grid: nodes are SuperNodes that are connected."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def nodes(self) -> Sequence[int]:
        """The SuperNodes whose heartbeat is fresh."""
        return list(self.grid.get_node_ids())

    def ask(
        self, questions: Mapping[int, Parcel], seconds: float
    ) -> Iterator[tuple[int, Parcel | Lost]]:
        """Push every question, then look for answers until all are there or time is up."""
        return replies_in_time(self._arriving(questions, seconds), set(questions))

    def _arriving(
        self, questions: Mapping[int, Parcel], seconds: float
    ) -> Iterator[tuple[int, Parcel | Lost]]:
        messages = [
            Message(packed(parcel), node, KINDS[parcel.text("ask")], ttl=max(seconds, 1.0))
            for node, parcel in questions.items()
        ]
        if not messages:
            return
        sent = zip(self.grid.push_messages(messages), questions, strict=True)
        waiting = {id: node for id, node in sent if id}
        asked = time.monotonic()
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                if reply.has_error():
                    about = reply.error
                    yield node, Lost(ERRORS.get(about.code) or about.reason or str(about.code))
                else:
                    yield node, unpacked(reply.content)
            waited = time.monotonic() - asked
            if waited > seconds:
                return
            if waiting:
                time.sleep(pause(waited, LONGEST))


def replies_in_time(
    arriving: Iterable[tuple[int, Parcel | Lost]], asked: set[int]
) -> Iterator[tuple[int, Parcel | Lost]]:
    """Those that came, each node once and only if it was asked; ``Lost`` for the others."""
    left = set(asked)
    for node, reply in arriving:
        if node in left:
            left.remove(node)
            yield node, reply
    for node in sorted(left):
        yield node, Lost("no answer within the time that it had")
