"""A site's connection: one process that polls the SuperLink for questions and answers them.

Flower's SuperNode starts a process for every message and runs code that the coordinator sends.
This one speaks the same Fleet API, keeps the model in memory, and never fetches code: a site runs
only the rolora that its operator installed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from flwr.app import Message

from rolora.files import locked, make_folder, sweep, write_file
from rolora.flower.message import SiteMessage
from rolora.flower.transport import from_record, poll_interval, to_record
from rolora.sites.flower_internals import Fleet, Gone, NotConnected, from_bytes, to_bytes
from rolora.sites.site_config import SiteConfig

LONGEST = 1.0  # seconds between polls
IDLE_AFTER, IDLE_LONGEST = 600.0, 3.0  # after this many seconds without a question

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
    make_folder(site.folder)
    pending = site.folder / "question.bin"
    with ExitStack() as stack:
        stack.enter_context(locked(site.folder / ".lock"))
        sweep(site.folder)
        try:
            fleet = stack.enter_context(Fleet.join(site, last_node(site.folder)))
        except NotConnected as error:
            raise NotConnected(
                f"{site.superlink}: {error}; to find out more: rolora site --check"
            ) from None
        write_file(site.folder / "node", f"{fleet.id} {site.folder.stat().st_ino}")
        notify(f"{site.name}: connected to {site.superlink}, waiting for runs")
        for message in _questions(fleet, pending):
            start = time.monotonic()
            question = from_record(message.content)
            reply = answer(question)
            seconds = time.monotonic() - start
            try:
                fleet.push(Message(to_record(reply), reply_to=message), seconds)
            except (Gone, NotConnected) as error:  # no one is waiting for it any more
                _log.warning("an answer was dropped: %s", error)
            pending.unlink(missing_ok=True)
            notify(f"{site.name}: {_described(question, reply)} ({seconds:.1f} s)")


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


def _questions(fleet: Fleet, pending: Path) -> Iterator[Message]:
    """The node's messages as they come, without end.

    The one being answered is in the file ``pending``: the SuperLink sends each message once, so
    the next process of a site that was killed continues with it.
    """
    if (message := _left_over(fleet, pending)) is not None:
        yield message
    free = time.monotonic()
    while True:
        try:
            message = fleet.pull()
        except Gone as error:
            _log.warning("a question was dropped: %s", error)
            continue
        if message is None:
            waited = time.monotonic() - free
            longest = LONGEST if waited < IDLE_AFTER else IDLE_LONGEST
            time.sleep(poll_interval(waited, longest))
            continue
        try:
            write_file(pending, to_bytes(message))
        except OSError as error:
            _log.warning("a question that is lost if this site is killed now: %s", error)
        yield message
        free = time.monotonic()


def _left_over(fleet: Fleet, pending: Path) -> Message | None:
    """The question that the previous process did not answer, unless it has expired.

    It stays on disk until it is answered, so that the next process can be killed, too.
    """
    try:
        message = from_bytes(pending.read_bytes())
        about = message.metadata
        if about.created_at + about.ttl > time.time() and about.dst_node_id == fleet.id:
            return message
    except FileNotFoundError:
        return None
    except ValueError:
        _log.warning("%s is damaged: a question stays unanswered", pending)
    pending.unlink()
    return None


def _described(question: SiteMessage, reply: SiteMessage) -> str:
    """A line for the operator about one question and its answer."""
    ask, run = question.head.get("ask"), question.head.get("run")
    round = f", round {question.head['round']}" if "round" in question.head else ""
    done = f"{len(reply.tensors)} tensors, {reply.size:,} bytes sent"
    if "error" in reply.head:
        done = f"refused ({reply.head['error']}): {reply.note}"
    return f"run {run}{round}: {ask}: {done}"
