"""Flower's SuperLink behind a gate: other machines may only use the sites' interface.

Flower serves three interfaces on one port. Whoever reaches the Control API may register keys and
start runs, whose code is executed on the coordinator, and Flower asks for no credentials. So
requests from other machines reach the Fleet API and nothing else, except that /rolora answers
everyone with the coordinator's versions.

Run as ``python -m rolora.sites.superlink`` with the arguments of ``flower-superlink``.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

from rolora.flower.message import VERSIONS, versions
from rolora.sites.flower_internals import superlink
from rolora.sites.processes import end_with_parent

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
FOR_SITES = "/v1/fleet/"


def gated(app: App) -> App:
    """The ASGI application ``app``, of which other machines reach the sites' interface only."""

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == VERSIONS:
            await _answer(send, 200, json.dumps(versions()).encode())
        elif scope["type"] != "http" or allowed(scope["path"], scope.get("client")):
            await app(scope, receive, send)
        else:
            await _answer(send, 403, b"not from another machine\n")

    return gate


async def _answer(send: Send, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


def allowed(path: str, client: tuple[str, int] | None) -> bool:
    """Whether a client at this address may request this path."""
    if path.startswith(FOR_SITES):
        return True
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def main() -> None:
    """Serve until interrupted, or until the process that started this one has ended."""
    end_with_parent(os.getppid())
    app, config = superlink()
    uvicorn.run(
        app=gated(app),
        host=config.host,
        port=config.port,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        access_log=False,
        log_level="warning",
        workers=1,
    )


if __name__ == "__main__":
    main()
