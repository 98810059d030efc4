"""The only file that imports Flower's private modules: the Fleet API, SuperLink and SuperExec.

Flower may change them in any version: tests/test_flower_internals.py reports which name is gone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.cli.constant import (
    ACCESS_TOKEN_STORE_KEY,
    AUTHN_TYPE_STORE_KEY,
    REFRESH_TOKEN_STORE_KEY,
)
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    AuthnType,
)
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
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    TASK_TYPE_TO_APPIO_API_ADDRESS_ARG,
    TASK_TYPE_TO_COMMAND,
)
from flwr.supercore.date import now
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
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from rolora.errors import RoloraError
from rolora.sites.keys import public_pem, read_certificate, read_private_key

if TYPE_CHECKING:
    from rolora.sites.site_config import SiteConfig  # which imports torch: the SuperLink has none

ONLY_SITES = "this port is for sites with a registered key, and serves nothing else"
AWAY = (502, 503, 504)  # a proxy's answers when the SuperLink behind it is down
LONGEST = 10.0  # seconds between two attempts

NOT_REGISTERED = "this key is not registered"
NOT_SIGNED = "no signature, or a wrong one, or one of another time"
ASKS_FOR_KEY = "the SuperLink asks for a key: set this site's in site.toml, as key = ..."
UNKNOWN = "the SuperLink does not know this site's key (have the coordinator register it)"
UNVERIFIED = (
    "the SuperLink cannot verify this site's signature: are both clocks right to the minute?"
)
REFUSALS = {  # what is in the SuperLink's answer -> what the site's operator should know
    ONLY_SITES: ASKS_FOR_KEY,  # a site asks for nothing else, except to register a key of its own
    '"code":2001': ASKS_FOR_KEY,
    NOT_REGISTERED: UNKNOWN,
    '"code":2004': f"{UNKNOWN}, or it was used elsewhere within the last minute",
    NOT_SIGNED: UNVERIFIED,
    "Invalid SuperNode authentication": UNVERIFIED,
}

_log = logging.getLogger(__name__)


class NotConnected(RoloraError):
    """The SuperLink cannot be reached, or refuses this site; the message says what to do."""


class Gone(Exception):
    """The run of a message has ended, by the SuperLink."""


@dataclass(frozen=True)
class Fleet:
    """A site's node at the SuperLink. Its requests are signed with the site's key."""

    client: FleetHttpClient
    id: int

    @classmethod
    @contextmanager
    def join(cls, site: SiteConfig, last: int | None = None) -> Iterator[Fleet]:
        """The site's node, online and sending heartbeats while the block lasts.

        A site without a key gets a new one, for a SuperLink that asks for none. Flower refuses a
        node whose last process was killed less than a minute ago, since it counts as alive; with
        its id as ``last``, this process continues as that node. Raises ConfigError if the key or
        the certificate cannot be read, NotConnected if the SuperLink refuses the site.
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
            fleet = cls(client, _activate(client, public_pem(key), path is None, last))
            sender = HeartbeatSender(lambda: _beat(client, fleet.id))
            sender.start()
            try:
                yield fleet
            finally:
                sender.stop()
                try:
                    client.DeactivateNode(DeactivateNodeRequest(node_id=fleet.id))
                except httpx.HTTPError:
                    _log.warning("the SuperLink could not be told that this site leaves")

    def pull(self) -> Message | None:
        """The next message for this node, if there is one. Raises NotConnected, or Gone."""
        node = Node(node_id=self.id)
        pulled = _retried(self.client.PullMessages)(PullMessagesRequest(node=node))
        if not pulled.messages_list:
            return None
        run, tree = pulled.messages_list[0].metadata.run_id, pulled.message_object_trees[0]
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(_retried(self.client.PullObject), node, run),
            make_confirm_message_received_fn_protobuf(
                _retried(self.client.ConfirmMessageReceived), node, run
            ),
            return_type=Message,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def push(self, message: Message, seconds: float) -> None:
        """Send an answer that took this many seconds. Raises NotConnected, or Gone."""
        node = Node(node_id=self.id)
        message.metadata.__dict__["_message_id"] = message.object_id
        request = PushMessagesRequest(
            node=node,
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[get_object_tree(message)],
            clientapp_runtime_list=[seconds],
        )
        sent = _retried(self.client.PushMessages)(request)
        push_objects(
            get_all_nested_objects(message),
            make_push_object_fn_protobuf(
                _retried(self.client.PushObject), node, message.metadata.run_id, sent.session_id
            ),
            object_ids_to_push=set(sent.objects_to_push),
        )


def _activate(client: FleetHttpClient, public: bytes, register: bool, last: int | None) -> int:
    """Take the node of this key online; its id. ``register``: the SuperLink asks for no keys."""
    try:
        if register:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public))
        request = ActivateNodeRequest(
            public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        return int(client.ActivateNode(request).node_id)
    except httpx.TransportError as error:
        raise NotConnected(f"no connection: {error}") from None
    except httpx.HTTPStatusError as error:
        if last is not None and _beat(client, last):
            return last
        raise NotConnected(f"refused: {_meaning(error)}") from None


def _beat(client: FleetHttpClient, node: int) -> bool:
    """Send one heartbeat; whether the SuperLink has received it and knows the node."""
    request = SendNodeHeartbeatRequest(
        node=Node(node_id=node), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
    )
    try:
        return bool(client.SendNodeHeartbeat(request).success)
    except httpx.HTTPError:
        return False


def _retried(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The call, repeated at least every 10 s while the SuperLink cannot be reached.

    It raises Gone if the run has ended, NotConnected if the SuperLink refuses the request.
    """

    def repeat(request: Any) -> Any:
        wait = 0.5
        while True:
            try:
                return call(request)
            except httpx.TransportError as error:
                why: object = error
            except httpx.HTTPStatusError as error:
                why = error.response.status_code
                if why == httpx.codes.FORBIDDEN:
                    raise Gone("its run has ended") from None
                if why == httpx.codes.UNAUTHORIZED:
                    raise NotConnected(
                        "the SuperLink no longer accepts this site's key: ask the coordinator"
                    ) from None
                if why not in AWAY:
                    raise NotConnected(f"the SuperLink answered: {_meaning(error)}") from None
            _log.warning("the SuperLink does not answer (%s); next attempt in %.0f s", why, wait)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST)

    return repeat


def _meaning(error: httpx.HTTPStatusError) -> str:
    """What a refusal means for the site's operator; the answer itself if that is not known."""
    for part, known in REFUSALS.items():
        if part in error.response.text:
            return known
    return f"{error.response.status_code} {' '.join(error.response.text.split())[:200]}"


def to_bytes(message: Message) -> bytes:
    """A message as bytes, to keep on disk."""
    return bytes(message_to_proto(message).SerializeToString())


def from_bytes(data: bytes) -> Message:
    """The message that ``to_bytes`` was given. ValueError if the bytes are damaged."""
    try:
        return message_from_proto(MessageProto.FromString(data))
    except Exception as error:  # protobuf's, or what Flower finds in it
        raise ValueError(f"no message: {error}") from error


def superlink(arguments: Sequence[str]) -> Any:
    """Flower's ASGI app, as ``flower-superlink`` with these arguments would serve it."""
    from flwr.superlink.cli.flower_superlink import (  # half a second, and no site needs it
        SuperLinkLifespan,
        _parse_superlink_lifespan_config,
    )
    from flwr.superlink.main import create_app

    sys.argv[1:] = arguments
    return create_app(_parse_superlink_lifespan_config(), SuperLinkLifespan)


def unsigned(app: Any) -> Callable[[Sequence[tuple[bytes, bytes]]], Awaitable[str | None]]:
    """A function that says why headers are not a site's; None if a registered key signed them now.

    A signature is of the time alone. So that the key is that of the node in the body, Flower
    checks when it has read the body.
    """

    def check(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        given = {name.decode(): value.decode("latin-1") for name, value in reversed(headers)}
        try:
            key = b64decode(given[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
            signature = b64decode(given[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
            signed = given[TIMESTAMP_HEADER]
            age = (now() - datetime.fromisoformat(signed)).total_seconds()
        except (KeyError, ValueError, TypeError):
            return NOT_SIGNED
        if app.state.linkstate_factory.state().get_node_id_by_public_key(key) is None:
            return NOT_REGISTERED
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return NOT_SIGNED
        if not verify_signature(bytes_to_public_key(key), signed.encode(), signature):
            return NOT_SIGNED
        return None

    return lambda headers: asyncio.to_thread(check, headers)


def superexec() -> None:
    """Flower's SuperExec, as ``flower-superexec`` with this process's arguments would run it.

    Except that it does not write a run's token into the command line, which all users can read.
    """
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
    from flwr.supercore.superexec.executor.types import LaunchResult

    def launch(executor: Any, spec: Any) -> Any:
        start_task(spec)
        return LaunchResult.accepted()

    SubprocessExecutor.launch = launch
    flower_superexec()


def start_task(spec: Any) -> subprocess.Popen[bytes]:
    """Start the program of a task. It reads its token from a file that has no name."""
    with tempfile.TemporaryFile() as token:
        token.write(spec.token.encode())
        token.flush()
        command = [TASK_TYPE_TO_COMMAND[spec.task_type]]
        command += [TASK_TYPE_TO_APPIO_API_ADDRESS_ARG[spec.task_type], spec.runtime_api_address]
        command += ["--root-certificates", spec.root_certificates_path]
        command += ["--parent-pid", str(spec.parent_pid)]
        command += ["--token-file", f"/dev/fd/{token.fileno()}"]
        return subprocess.Popen(command, pass_fds=[token.fileno()])


def credentials(address: str, secret: bytes) -> bytes:
    """The file in which Flower's command line finds the secret that it sends to this address."""
    values = {
        AUTHN_TYPE_STORE_KEY: AuthnType.OIDC.encode(),
        ACCESS_TOKEN_STORE_KEY: secret,
        REFRESH_TOKEN_STORE_KEY: b"none",
    }
    stored = {key % address: b64encode(value).decode() for key, value in values.items()}
    return json.dumps(stored).encode()  # which is YAML, too
