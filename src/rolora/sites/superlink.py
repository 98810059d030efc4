"""Flower's SuperLink behind two gates: what a request may do depends on the socket it came to.

Flower serves three interfaces on one port. Whoever reaches the Control API may register keys and
start runs, whose code is executed on the coordinator. So there are two listeners. The one for other
machines serves the sites' routes only, and reads no body before it has seen that a registered key
has signed the request and that the body is not too large. The one for control is bound to
127.0.0.1, where the Control API needs the federation's secret, and Flower itself authenticates the
Runtime API. The address that a request claims to come from is never trusted.

Run as ``python -m rolora.sites.superlink FOLDER HOST PORT``; control is on the next port. This
process does not import torch, which would more than double its memory.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

from rolora.flower.versions import VERSIONS, versions
from rolora.sites.expected import largest
from rolora.sites.flower_internals import ONLY_SITES, superlink, unsigned
from rolora.sites.logs import escape_records
from rolora.sites.processes import end_with_parent

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]
Headers = Sequence[tuple[bytes, bytes]]

SMALL = 2**20  # bytes that every message of a site may have: labels, metrics, what Flower adds
ROOM = 1.1  # times what a run expects
FOR_SITES = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "pull-object",
        "confirm-message-received",
        "push-messages",
        "push-object",
        "get-run",  # this one and the next are asked by Flower's own SuperNode
        "get-fab",
    )
)
CONTROL, RUNTIME = "/v1/control/", "/v1/runtime/"


class Answer(NamedTuple):
    """What is answered in place of the app."""

    status: int
    text: str


ONLY_CONTROL = Answer(403, "this port is for control, and serves nothing else")
NO_SECRET = Answer(401, "control needs the secret of the federation's folder")


def for_sites(
    app: App, unsigned: Callable[[Headers], Awaitable[str | None]], largest: Callable[[], int]
) -> App:
    """``app`` as other machines reach it: the sites' routes, for requests that a site has signed.

    ``unsigned`` says why headers are not signed by a registered key, or None if they are;
    ``largest`` is the number of bytes that a run under way expects of one message, 0 without a run.
    The body is read here, up to the limit, and handed on in one piece.
    """
    told = Answer(200, json.dumps(versions()))

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
        if scope["type"] != "http":
            return
        route, declared = (scope["method"], scope["path"]), _declared(scope["headers"])
        if route == ("GET", VERSIONS):
            await _answer(send, told, declared)
            return
        if scope["method"] != "POST" or scope["path"] not in FOR_SITES:
            await _answer(send, Answer(403, ONLY_SITES), declared)
            return
        if why := await unsigned(scope["headers"]):
            await _answer(send, Answer(401, why), declared)
            return
        limit = SMALL + int(ROOM * largest())
        body = await _body(receive, limit) if declared is None or declared <= limit else None
        if body is None:
            await _answer(send, Answer(413, f"more than {limit:,} bytes"), declared)
            return
        await app(scope, _in_one_piece(body, receive), send)

    return gate


def for_control(app: App, secret: bytes) -> App:
    """``app`` as this machine reaches it: control with the ``secret``, and the Runtime API."""
    wanted = b"Bearer " + secret

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if scope["path"].startswith(CONTROL) and not hmac.compare_digest(given, wanted):
            await _answer(send, NO_SECRET, _declared(scope["headers"]))
        elif scope["path"].startswith((CONTROL, RUNTIME)):
            await app(scope, receive, send)
        else:
            await _answer(send, ONLY_CONTROL, _declared(scope["headers"]))

    return gate


def by_port(sites: App, control: App, port: int) -> App:
    """``control`` for what came to this port of this machine, ``sites`` for all else."""

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        _, reached = scope.get("server") or ("", None)
        await (control if reached == port else sites)(scope, receive, send)

    return gate


def _declared(headers: Headers) -> int | None:
    """The body's length in bytes, by its header; None if that does not say."""
    given = dict(headers)
    length = given.get(b"content-length", b"0")
    told = b"transfer-encoding" not in given and length.isdigit() and len(length) < 20
    return int(length) if told else None


async def _answer(send: Send, answer: Answer, declared: int | None) -> None:
    """Answer without the app. The connection is closed, unless little is still to come on it."""
    body = f"{answer.text}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    if declared is None or declared > SMALL:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive, limit: int) -> bytes | None:
    """A request's whole body; None as soon as it has more bytes than ``limit``, or is cut short."""
    parts, size = list[bytes](), 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit or message["type"] != "http.request":
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _in_one_piece(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that first gives this body."""
    left = [body]

    async def whole() -> Scope:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return whole


def main() -> None:
    """Serve until interrupted, or until the process that started this one has ended."""
    end_with_parent(os.getppid())
    escape_records()
    folder, host, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    secret = folder / "control.secret"
    certificate, key = str(folder / "server.crt"), str(folder / "server.key")
    app = superlink(
        [
            *("--host", host, "--port", str(port)),
            *("--ssl-ca-certfile", str(folder / "ca.crt")),
            *("--ssl-certfile", certificate, "--ssl-keyfile", key),
            *("--isolation", "process", "--database", str(folder / "state.db")),
            *("--superexec-auth-secret-file", str(secret)),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        ]
    )
    sites = for_sites(app, unsigned(app), lambda: largest(folder))
    server = uvicorn.Server(
        uvicorn.Config(
            by_port(sites, for_control(app, secret.read_bytes()), port + 1),
            http="h11",  # which bounds the size of a request's head
            ws="none",
            proxy_headers=False,
            ssl_certfile=certificate,
            ssl_keyfile=key,
            access_log=False,
            log_level="warning",
        )
    )
    listeners = [(host, port), ("127.0.0.1", port + 1)]
    with contextlib.suppress(KeyboardInterrupt):
        server.run([socket.create_server(address) for address in listeners])


if __name__ == "__main__":
    main()
