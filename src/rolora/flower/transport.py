"""Site messages inside Flower's messages, sent and received through Flower's grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event
from typing import TypeVar

import httpx
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from rolora.flower.message import SiteMessage, lost

T = TypeVar("T")
TYPES = {
    "hello": MessageType.QUERY,
    "ready": MessageType.QUERY,
    "train": MessageType.TRAIN,
    "score": MessageType.EVALUATE,
}
RECORD, BODY = "rolora", "body"
LONGEST = 0.5  # seconds between polls for answers
MOST_IN_BACKGROUND = 64  # nodes that are asked in the background at the same time


def to_record(message: SiteMessage) -> RecordDict:
    """The content of a Flower message that carries ``message``."""
    return RecordDict({RECORD: ConfigRecord({**message.head, BODY: message.body})})


def from_record(content: RecordDict) -> SiteMessage:
    """The message in a Flower message's content, unchecked; an empty one if there is none."""
    record = content.config_records.get(RECORD, ConfigRecord())
    plain = {k: v for k, v in record.items() if isinstance(v, str | int | float | bool)}
    head = {key: value for key, value in plain.items() if key != BODY}
    body = record.get(BODY, b"")
    return SiteMessage(head, body if isinstance(body, bytes) else b"")


def poll_interval(waited: float, longest: float) -> float:
    """Seconds to the next poll for a message after waiting ``waited`` seconds for it.

    A poll costs a kilobyte on the wire, so the interval grows with the waiting: a message is
    noticed at most a tenth of the waiting late, or 0.2 s, and never later than ``longest``.
    """
    return min(max(waited / 10, 0.2), longest)


@dataclass(frozen=True)
class GridTransport:
    """The ``Transport`` of Flower's grid: the nodes are connected SuperNodes.

    Once Flower's grid is connected, threads may use it at the same time: what they share, an
    ``httpx.Client`` and a retry that has locks of its own, is made for that.
    """

    grid: Grid
    ended: Event = field(default_factory=Event)
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(MOST_IN_BACKGROUND, "background")
    )

    def in_background(self, work: Callable[[], T]) -> Future[T]:
        """Do this in a thread of its own."""
        return self.pool.submit(work)

    def close(self) -> None:
        """Give up every question, in whatever thread, within one poll."""
        self.ended.set()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def nodes(self) -> Sequence[int]:
        """The SuperNodes that have sent a heartbeat recently."""
        return list(self.grid.get_node_ids())

    def ask(
        self, questions: Mapping[int, SiteMessage], seconds: float
    ) -> Iterator[tuple[int, SiteMessage]]:
        """Push every question, then poll for answers until all have come or the time is up.

        Each answer is pulled by itself: one that was announced and is never sent would hold up all
        others, for as long as Flower waits for it.
        """
        asks = questions and seconds > 0 and not self.ended.is_set()
        waiting = self._pushed(questions, seconds) if asks else {}
        start, silent = time.monotonic(), set(questions)
        pulls: dict[str, Future[SiteMessage | None]] = {}
        pool = ThreadPoolExecutor(max(len(waiting), 1))
        try:
            while waiting and (waited := time.monotonic() - start) < seconds:
                if self.ended.is_set():
                    break
                for id in [id for id in waiting if id not in pulls]:
                    pulls[id] = pool.submit(self._pulled, id)
                wait(pulls.values(), min(seconds - waited, LONGEST))
                for id in [id for id, pull in pulls.items() if pull.done()]:
                    if (answer := pulls.pop(id).result()) is not None:
                        node = waiting.pop(id)
                        silent.remove(node)
                        yield node, answer
                if waiting:
                    self.ended.wait(poll_interval(waited, LONGEST))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for node in sorted(silent):
            yield node, lost("no answer before the deadline")

    def _pulled(self, id: str) -> SiteMessage | None:
        """The answer to the message with this id, if it has come.

        One at a time: Flower raises for an answer that is no message, and would drop all that it
        pulled together with it.
        """
        try:
            for reply in self.grid.pull_messages([id]):
                if reply.metadata.reply_to_message_id == id:
                    return _content(reply)
        except httpx.HTTPError:  # the SuperLink's fault and no node's
            raise
        except Exception as error:
            return SiteMessage({"error": f"its answer is not a message ({type(error).__name__})"})
        return None

    def _pushed(self, questions: Mapping[int, SiteMessage], seconds: float) -> dict[str, int]:
        """Id of the message -> its node, of the questions that could be pushed."""
        # they expire after the deadline here, so that Flower never reports an expired one
        messages = [
            Message(to_record(question), node, TYPES[question.text("ask")], ttl=seconds + 1)
            for node, question in questions.items()
        ]
        sent = zip(self.grid.push_messages(messages), questions, strict=True)
        return {id: node for id, node in sent if id}


def _content(reply: Message) -> SiteMessage:
    if reply.has_error():
        reason = reply.error.reason or f"error {reply.error.code}"
        return lost(f"Flower reports: {' '.join(reason.split())}")
    return from_record(reply.content)
