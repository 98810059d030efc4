"""A site's connection: one process that asks the SuperLink for messages, answers them, and stays.

Flower's SuperNode starts a process for every message and runs the code that the coordinator sends
along. This one speaks the same Fleet API, keeps the model in memory, and never fetches that code:
a site runs nothing but the rolora that its operator installed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supernode.fleet_http_client import FleetHttpClient

from rolora.errors import ConfigError
from rolora.files import locked, write_file
from rolora.flower.message import Parcel
from rolora.flower.transport import packed, pause, unpacked
from rolora.sites.fleet import NotConnected, activate, beat, fleet_client, leave, node_keys, said
from rolora.sites.site_config import SiteConfig

LONGEST = 1.0  # seconds between looks for messages
IDLE, REST = 600.0, 3.0  # after so many seconds without any, between looks
AWAY = (502, 503, 504)  # what a proxy says when the SuperLink behind it is down
Answer = TypeVar("Answer")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connection:
    """A node that the SuperLink knows and takes for alive.

    ``pending`` is a file that holds the message being answered: the SuperLink hands out each one
    once, so a process that was killed over it leaves it to the next.
    """

    client: FleetHttpClient
    node: Node
    pending: Path

    def messages(self) -> Iterator[Message]:
        """Messages for this node as they come, for ever; first the one that was left over, once."""
        if (message := self._left_over()) is not None:
            yield message
        free = time.monotonic()
        while True:
            found = retry(lambda: self.client.PullMessages(PullMessagesRequest(node=self.node)))
            if not found.messages_list:
                waited = time.monotonic() - free
                time.sleep(pause(waited, LONGEST if waited < IDLE else REST))
                continue
            run = found.messages_list[0].metadata.run_id
            try:
                message = self._whole(run, found.message_object_trees[0])
            except Gone:
                _log.warning("a message was dropped: its run has ended")
                continue
            write_file(self.pending, message_to_proto(message).SerializeToString())
            yield message
            free = time.monotonic()

    def reply(self, message: Message, seconds: float) -> None:
        """Send an answer that took so many seconds; if nobody waits for it now, drop it."""
        message.metadata.__dict__["_message_id"] = message.object_id
        tree, run = get_object_tree(message), message.metadata.run_id
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[tree],
            clientapp_runtime_list=[seconds],
        )
        try:
            sent = retry(lambda: self.client.PushMessages(request))
            push = make_push_object_fn_protobuf(
                lambda request: retry(lambda: self.client.PushObject(request)),
                self.node,
                run,
                sent.session_id,
            )
            everything = get_all_nested_objects(message)
            push_objects(everything, push, object_ids_to_push=set(sent.objects_to_push))
        except (Gone, NotConnected) as error:
            _log.warning("an answer was dropped: %s", error)
        self.pending.unlink(missing_ok=True)

    def _left_over(self) -> Message | None:
        """The message that another process took up and did not live to answer, if it still may."""
        try:
            message = message_from_proto(MessageProto.FromString(self.pending.read_bytes()))
        except FileNotFoundError:
            return None
        self.pending.unlink()
        about = message.metadata
        current = about.created_at + about.ttl > time.time()
        return message if current and about.dst_node_id == self.node.node_id else None

    def _whole(self, run: int, tree: ObjectTree) -> Message:
        client, node = self.client, self.node
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(
                lambda request: retry(lambda: client.PullObject(request)), node, run
            ),
            make_confirm_message_received_fn_protobuf(
                lambda request: retry(lambda: client.ConfirmMessageReceived(request)), node, run
            ),
            return_type=Message,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message


class Gone(Exception):
    """The SuperLink says that the run of a message is no longer running."""

    def __str__(self) -> str:
        return "its run has ended"


def retry(ask: Callable[[], Answer]) -> Answer:
    """The answer, asked for again, up to every 10 s, while the SuperLink cannot be reached.

    Raises Gone if the run has ended, NotConnected if the SuperLink no longer accepts the key.
    """
    wait = 0.5
    while True:
        try:
            return ask()
        except httpx.TransportError as error:
            why: object = error
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status == httpx.codes.FORBIDDEN:
                raise Gone from None
            if status == httpx.codes.UNAUTHORIZED:
                raise NotConnected(
                    "the SuperLink no longer accepts this site's key: ask the coordinator"
                ) from None
            if status not in AWAY:
                raise NotConnected(f"the SuperLink answered: {said(error)}") from None
            why = status
        _log.warning("the SuperLink does not answer (%s); again in %.0f s", why, wait)
        time.sleep(wait)
        wait = min(2 * wait, 10.0)


@contextmanager
def connected(site: SiteConfig) -> Iterator[Connection]:
    """A connection that says every half minute that this site is there, until it is left.

    Raises NotConnected where the SuperLink does not have this site, and why.
    """
    key, public = node_keys(site)
    with fleet_client(site, key) as client:
        last = last_node(site.folder)
        try:
            id = activate(client, public, register=site.key is None, last=last)
        except NotConnected as error:
            raise NotConnected(
                f"{site.superlink}: {error}; what is wrong: rolora site --check"
            ) from None
        node = Node(node_id=id)
        write_file(site.folder / "node", f"{node.node_id} {site.folder.stat().st_ino}")
        heart = HeartbeatSender(lambda: beat(client, node.node_id))
        heart.start()
        try:
            yield Connection(client, node, site.folder / "question.bin")
        finally:
            heart.stop()
            leave(client, node.node_id)


def last_node(folder: Path) -> int | None:
    """The id of the node that the process before this one was, if it was one of this very folder.

    A copy of the folder has another inode: its process must not go on as the node of the original,
    which may be alive, and is refused while that is.
    """
    try:
        node, inode = (folder / "node").read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return int(node) if int(inode) == folder.stat().st_ino else None


def serve(
    site: SiteConfig,
    answer: Callable[[Parcel], Parcel],
    tell: Callable[[str], None],
) -> None:
    """Connect, and answer until interrupted. ``tell`` gets a line for everything that happens."""
    site.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(site.folder / ".lock"))
        except BlockingIOError:
            raise ConfigError(f"another rolora site is using {site.folder}") from None
        connection = held.enter_context(connected(site))
        tell(f"{site.name}: connected to {site.superlink}, waiting for runs")
        for message in connection.messages():
            started = time.monotonic()
            question = unpacked(message.content)
            reply = answer(question)
            seconds = time.monotonic() - started
            connection.reply(Message(packed(reply), reply_to=message), seconds)
            tell(f"{site.name}: {described(question, reply)} ({seconds:.1f} s)")


def described(question: Parcel, reply: Parcel) -> str:
    """A line for the operator about one question and its answer."""
    asked, run = question.head.get("ask"), question.head.get("run")
    round = f", round {question.head['round']}" if "round" in question.head else ""
    said = f"{len(reply.tensors)} tensors, {len(reply.body):,} bytes sent"
    if "error" in reply.head:
        said = f"refused: {reply.head['error']}"
    return f"run {run}{round}: {asked}: {said}"


def leave_with(parent: int) -> None:
    """Be interrupted when the process with this id is gone."""
    start_parent_process_monitor(parent)
