"""The only file that imports Flower's private modules: the Fleet API, and the SuperLink's app.

Flower may change them in any version: tests/test_flower_internals.py says which name has gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node
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
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from rolora.sites.keys import public_pem, read_certificate, read_private_key
from rolora.sites.retry import NotConnected, meaning, retry
from rolora.sites.site_config import SiteConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fleet:
    """A client of the SuperLink's Fleet API that signs its requests with a site's key."""

    client: FleetHttpClient
    public_key: bytes

    @classmethod
    @contextmanager
    def open(cls, site: SiteConfig) -> Iterator[Fleet]:
        """The client of a site. ConfigError if its key or certificate cannot be read.

        A site without a key gets a new one, for a SuperLink that asks for none.
        """
        certificates, path = site.path(site.certificates), site.path(site.key)
        if certificates is not None:
            read_certificate(certificates)  # httpx would only say "Unknown error 136"
        key = ec.generate_private_key(ec.SECP384R1()) if path is None else read_private_key(path)
        with FleetHttpClient.from_server_address(
            site.superlink,
            insecure=certificates is None,
            root_certificates=None if certificates is None else str(certificates),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        ) as client:
            yield cls(client, public_pem(key))

    def activate(self, register: bool, last: int | None = None) -> int:
        """Take this site's node online; its id. ``register``: the SuperLink asks for no keys.

        Flower refuses a node whose last process was killed less than a minute ago, since it counts
        as alive; with its id as ``last``, this process continues as that node. Raises NotConnected.
        """
        try:
            if register:
                self.client.RegisterNode(RegisterNodeFleetRequest(public_key=self.public_key))
            request = ActivateNodeRequest(
                public_key=self.public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
            )
            return int(self.client.ActivateNode(request).node_id)
        except httpx.TransportError as error:
            raise NotConnected(f"no connection: {error}") from None
        except httpx.HTTPStatusError as error:
            if last is not None and self._beat(last):
                return last
            raise NotConnected(f"refused: {meaning(error)}") from None

    def deactivate(self, node: int) -> None:
        """Take the node offline, if the SuperLink can be reached."""
        try:
            self.client.DeactivateNode(DeactivateNodeRequest(node_id=node))
        except httpx.HTTPError:
            _log.warning("the SuperLink could not be told that this site leaves")

    @contextmanager
    def heartbeats(self, node: int) -> Iterator[None]:
        """Send the node's heartbeats from a thread while the block lasts."""
        sender = HeartbeatSender(lambda: self._beat(node))
        sender.start()
        try:
            yield
        finally:
            sender.stop()

    def pull(self, node: int) -> Message | None:
        """The next message for this node, if there is one. Raises NotConnected, or Gone."""
        pulled = retry(lambda: self.client.PullMessages(PullMessagesRequest(node=_proto(node))))
        if not pulled.messages_list:
            return None
        run, tree = pulled.messages_list[0].metadata.run_id, pulled.message_object_trees[0]
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(_retried(self.client.PullObject), _proto(node), run),
            make_confirm_message_received_fn_protobuf(
                _retried(self.client.ConfirmMessageReceived), _proto(node), run
            ),
            return_type=Message,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def push(self, node: int, message: Message, seconds: float) -> None:
        """Send an answer that took so many seconds. Raises NotConnected, or Gone."""
        message.metadata.__dict__["_message_id"] = message.object_id
        request = PushMessagesRequest(
            node=_proto(node),
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
            clientapp_runtime_list=[seconds],
        )
        sent = retry(lambda: self.client.PushMessages(request))
        push_objects(
            get_all_nested_objects(message),
            make_push_object_fn_protobuf(
                _retried(self.client.PushObject),
                _proto(node),
                message.metadata.run_id,
                sent.session_id,
            ),
            object_ids_to_push=set(sent.objects_to_push),
        )

    def _beat(self, node: int) -> bool:
        """Send one heartbeat; whether the SuperLink has received it and knows the node."""
        request = SendNodeHeartbeatRequest(
            node=_proto(node), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        try:
            return bool(self.client.SendNodeHeartbeat(request).success)
        except httpx.HTTPError:
            return False


def _proto(node: int) -> Node:
    return Node(node_id=node)


def _retried(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda request: retry(lambda: call(request))


def to_bytes(message: Message) -> bytes:
    """A message as bytes, to keep on disk."""
    return bytes(message_to_proto(message).SerializeToString())


def from_bytes(data: bytes) -> Message:
    """The message that ``to_bytes`` was given."""
    return message_from_proto(MessageProto.FromString(data))


def superlink() -> tuple[Any, Any]:
    """Flower's ASGI app for the command-line arguments of this process, and its configuration."""
    from flwr.superlink.cli.flower_superlink import (  # half a second, and no site needs it
        SuperLinkLifespan,
        _parse_superlink_lifespan_config,
    )
    from flwr.superlink.main import create_app

    config = _parse_superlink_lifespan_config()
    return create_app(config, SuperLinkLifespan), config
