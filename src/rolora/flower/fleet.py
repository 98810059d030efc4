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
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from rolora.errors import RoloraError
from rolora.flower.keys import read_private_key
from rolora.flower.site_config import SiteConfig

_log = logging.getLogger(__name__)


class NotConnected(RoloraError):
    """The SuperLink cannot be reached, or will not have this site; says which and what to do."""


def fleet_client(site: SiteConfig, key: EllipticCurvePrivateKey) -> FleetHttpClient:
    """A client of the SuperLink's Fleet API that signs what it asks with the site's key."""
    certificates = site.certificates and str(site.root / Path(site.certificates).expanduser())
    return FleetHttpClient.from_server_address(
        site.superlink,
        insecure=certificates is None,
        root_certificates=certificates,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )


def activate(client: FleetHttpClient, public: bytes, register: bool) -> int:
    """The id of the node with this public key, which is now online.

    Raises NotConnected in one line where that fails.
    """
    request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    try:
        if register:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public))
        return int(client.ActivateNode(request).node_id)
    except httpx.TransportError as error:
        raise NotConnected(f"no connection: {error}") from None
    except httpx.HTTPStatusError as error:
        raise NotConnected(f"refused: {said(error)}") from None


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
    '"code":2004': "the SuperLink does not know this site's key: have the coordinator register it",
    "Invalid SuperNode authentication": "the SuperLink cannot verify what this site signed: are "
    "both clocks right to the minute?",
}


def said(error: httpx.HTTPStatusError) -> str:
    """What a refusal means for who operates the site; the answer itself where that is unknown."""
    for part, meaning in SAID.items():
        if part in error.response.text:
            return meaning
    return f"{error.response.status_code} {' '.join(error.response.text.split())[:200]}"
