"""A site's connection: one process that polls the SuperLink for questions and answers them.

Flower's SuperNode starts a process for every message and runs code that the coordinator sends.
This one speaks the same Fleet API, keeps the model in memory, and never fetches code: a site runs
only the rolora that its operator installed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message

from rolora.files import locked, write_file
from rolora.flower.message import SiteMessage
from rolora.flower.transport import from_record, poll_interval, to_record
from rolora.sites.flower_internals import Fleet, from_bytes, to_bytes
from rolora.sites.retry import Gone, NotConnected
from rolora.sites.site_config import SiteConfig

LONGEST = 1.0  # seconds between polls
IDLE_AFTER, IDLE_LONGEST = 600.0, 3.0  # after so many seconds without a question

_log = logging.getLogger(__name__)


def serve(
    site: SiteConfig,
    answer: Callable[[SiteMessage], SiteMessage],
    notify: Callable[[str], None],
) -> None:
    """Connect, and answer until interrupted. ``notify`` receives a line for each question.

    Raises NotConnected if the SuperLink refuses this site, ConfigError if another process serves
    the same state folder.
    """
    site.folder.mkdir(parents=True, exist_ok=True)
    with locked(site.folder / ".lock"), connected(site) as connection:
        notify(f"{site.name}: connected to {site.superlink}, waiting for runs")
        for message in connection.messages():
            start = time.monotonic()
            question = from_record(message.content)
            reply = answer(question)
            seconds = time.monotonic() - start
            connection.reply(Message(to_record(reply), reply_to=message), seconds)
            notify(f"{site.name}: {_described(question, reply)} ({seconds:.1f} s)")


@contextmanager
def connected(site: SiteConfig) -> Iterator[Connection]:
    """The site's node, online and sending heartbeats. Raises NotConnected if it is refused."""
    with Fleet.open(site) as fleet:
        try:
            node = fleet.activate(register=site.key is None, last=last_node(site.folder))
        except NotConnected as error:
            raise NotConnected(
                f"{site.superlink}: {error}; to find out more: rolora site --check"
            ) from None
        write_file(site.folder / "node", f"{node} {site.folder.stat().st_ino}")
        try:
            with fleet.heartbeats(node):
                yield Connection(fleet, node, site.folder / "question.bin")
        finally:
            fleet.deactivate(node)


def last_node(folder: Path) -> int | None:
    """The node id of this site's previous process, if that ran in this very folder.

    A copy of the folder has another inode: its process must not continue as the original's node,
    which may be alive; the SuperLink refuses the copy while it is.
    """
    try:
        node, inode = (folder / "node").read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return int(node) if int(inode) == folder.stat().st_ino else None


@dataclass(frozen=True)
class Connection:
    """A node that is online.

    ``pending`` is the file that holds the question being answered: the SuperLink sends each one
    once, so the next process of a site that was killed takes it up from there.
    """

    fleet: Fleet
    node: int
    pending: Path

    def messages(self) -> Iterator[Message]:
        """The node's messages as they come, for ever, starting with a pending one."""
        if (message := self._left_over()) is not None:
            yield message
        free = time.monotonic()
        while True:
            try:
                message = self.fleet.pull(self.node)
            except Gone as error:
                _log.warning("a question was dropped: %s", error)
                continue
            if message is None:
                waited = time.monotonic() - free
                longest = LONGEST if waited < IDLE_AFTER else IDLE_LONGEST
                time.sleep(poll_interval(waited, longest))
                continue
            write_file(self.pending, to_bytes(message))
            yield message
            free = time.monotonic()

    def reply(self, message: Message, seconds: float) -> None:
        """Send an answer that took so many seconds, or drop it if nobody waits for it any more."""
        try:
            self.fleet.push(self.node, message, seconds)
        except (Gone, NotConnected) as error:
            _log.warning("an answer was dropped: %s", error)
        self.pending.unlink(missing_ok=True)

    def _left_over(self) -> Message | None:
        """The question that the previous process did not answer, unless it has expired."""
        try:
            message = from_bytes(self.pending.read_bytes())
        except FileNotFoundError:
            return None
        self.pending.unlink()
        about = message.metadata
        current = about.created_at + about.ttl > time.time()
        return message if current and about.dst_node_id == self.node else None


def _described(question: SiteMessage, reply: SiteMessage) -> str:
    """A line for the operator about one question and its answer."""
    ask, run = question.head.get("ask"), question.head.get("run")
    round = f", round {question.head['round']}" if "round" in question.head else ""
    done = f"{len(reply.tensors)} tensors, {len(reply.body):,} bytes sent"
    if "error" in reply.head:
        done = f"refused: {reply.head['error']}"
    return f"run {run}{round}: {ask}: {done}"
