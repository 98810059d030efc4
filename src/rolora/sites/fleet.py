"""The SuperLink's Fleet API as a site asks it: who is there, with which key, and what it says."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from rolora.errors import RoloraError
from rolora.sites.keys import read_certificate, read_private_key
from rolora.sites.site_config import SiteConfig

_log = logging.getLogger(__name__)


class NotConnected(RoloraError):
    """The SuperLink cannot be reached, or will not have this site; says which and what to do."""


def fleet_client(site: SiteConfig, key: EllipticCurvePrivateKey) -> FleetHttpClient:
    """A client of the SuperLink's Fleet API that signs what it asks with the site's key.

    Raises ConfigError where ``certificates`` names no certificate.
    """
    certificates = None
    if site.certificates is not None:
        path = site.root / Path(site.certificates).expanduser()
        read_certificate(path)  # in one line where httpx would say "Unknown error 136"
        certificates = str(path)
    return FleetHttpClient.from_server_address(
        site.superlink,
        insecure=certificates is None,
        root_certificates=certificates,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )


def activate(
    client: FleetHttpClient, public: bytes, register: bool, last: int | None = None
) -> int:
    """The id of the node with this public key, which is now online.

    Flower does not activate a node whose last process was killed less than a minute ago, since it
    takes it for alive; who knows that node's id, ``last``, goes on with it. Raises NotConnected in
    one line where that fails.
    """
    request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    try:
        if register:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public))
        return int(client.ActivateNode(request).node_id)
    except httpx.TransportError as error:
        raise NotConnected(f"no connection: {error}") from None
    except httpx.HTTPStatusError as error:
        if last is not None and beat(client, last):
            return last
        raise NotConnected(f"refused: {said(error)}") from None


def beat(client: FleetHttpClient, node: int) -> bool:
    """Say that this node is there; whether the SuperLink has heard it and knows the node."""
    request = SendNodeHeartbeatRequest(
        node=Node(node_id=node), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
    )
    try:
        return bool(client.SendNodeHeartbeat(request).success)
    except httpx.HTTPError:
        return False


def node_keys(site: SiteConfig) -> tuple[EllipticCurvePrivateKey, bytes]:
    """The site's key, or a new one for a SuperLink that asks for none; and its public half."""
    if site.key is None:
        key, public = generate_key_pairs()
        return key, public_key_to_bytes(public)
    key = read_private_key(site.root / Path(site.key).expanduser())
    return key, public_key_to_bytes(key.public_key())


def leave(client: FleetHttpClient, node: int) -> None:
    """Tell the SuperLink that this node goes offline, if it can be reached."""
    try:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    except httpx.HTTPError:
        _log.warning("the SuperLink could not be told that this site leaves")


SAID = {
    '"code":2001': "the SuperLink asks for a key: name this site's in site.toml, as key = ...",
    '"code":2004': "the SuperLink does not know this site's key (have the coordinator register "
    "it), or it was in use elsewhere within the last minute",
    "Invalid SuperNode authentication": "the SuperLink cannot verify what this site signed: are "
    "both clocks right to the minute?",
}


def said(error: httpx.HTTPStatusError) -> str:
    """What a refusal means for who operates the site; the answer itself where that is unknown."""
    for part, meaning in SAID.items():
        if part in error.response.text:
            return meaning
    return f"{error.response.status_code} {' '.join(error.response.text.split())[:200]}"
