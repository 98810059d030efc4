"""A tap between sites and a SuperLink that counts every byte, and knows what it was for.

It stands where the SuperLink does for the sites: it has the federation's certificate, ends their
TLS, and passes each request on over TLS of its own. So it sees both the TCP stream, as a site sends
and receives it, and the HTTP exchanges inside. Headers of TCP and IP, and what is sent twice, are
below what a socket shows.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
PIECE = 1 << 16


@dataclass(frozen=True)
class Exchange:
    """One HTTP request and its response; "up" is what the site sent. Sizes are bytes.

    ``stream_up`` and ``stream_down`` are the TCP stream's since the exchange before it on this
    connection: TLS is in these, and in a connection's ``first`` exchange the handshake. ``at`` is
    the clock (seconds since 1970) when the response had passed.
    """

    path: str
    at: float
    first: bool
    body_up: bytes = field(repr=False)
    body_down: bytes = field(repr=False)
    stream_up: int
    stream_down: int


class Counted:
    """The server's end of a TLS connection, over a socket whose bytes are counted."""

    def __init__(self, raw: socket.socket, context: ssl.SSLContext) -> None:
        self.raw = raw
        self.up = self.down = 0
        self._came, self._goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._came, self._goes, server_side=True)
        self._through(self._tls.do_handshake)

    def waiting(self) -> bool:
        """Whether something has been received that was not read yet."""
        return self._came.pending > 0

    def recv(self, size: int, /) -> bytes:
        """Decrypted bytes, none at the end."""
        try:
            return self._through(lambda: self._tls.read(size))
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return b""

    def sendall(self, data: bytes, /) -> None:
        """Encrypt and send all of it."""
        self._through(lambda: self._tls.write(data))

    def _through(self, step: Callable[[], Result]) -> Result:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                self._flush()
                received = self.raw.recv(PIECE)
                self.up += len(received)
                if received:
                    self._came.write(received)
                else:
                    self._came.write_eof()
                continue
            self._flush()
            return result

    def _flush(self) -> None:
        pending = self._goes.read()
        self.raw.sendall(pending)
        self.down += len(pending)


class Tap:
    """Listens on ``port`` of this machine until it is left; ``exchanges`` grows."""

    def __init__(self, federation: Path, superlink: int) -> None:
        self.exchanges: list[Exchange] = []
        self._to = ssl.create_default_context(cafile=federation / "ca.crt")
        self._from = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._from.load_cert_chain(federation / "server.crt", federation / "server.key")
        self._superlink = ("127.0.0.1", superlink)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def between(self, start: float, end: float) -> list[Exchange]:
        """The exchanges that ended in this time, in order."""
        found = [one for one in self.exchanges if start < one.at <= end]
        return sorted(found, key=lambda one: one.at)

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            threading.Thread(target=self._carry, args=(raw,), daemon=True).start()

    def _carry(self, raw: socket.socket) -> None:
        """One connection of a site, to its end."""
        # a site or a SuperLink that goes away is no fault of the tap's
        with raw, contextlib.suppress(ConnectionError, EOFError, ssl.SSLError):
            below = Counted(raw, self._from)
            plain = socket.create_connection(self._superlink)
            with plain, self._to.wrap_socket(plain, server_hostname="127.0.0.1") as above:
                up = down = 0
                while request := _next(raw, below, above):
                    above.sendall(b"".join(request))
                    response = _message(above.recv)
                    below.sendall(b"".join(response))
                    path = request[0].split(b" ", 2)[1].decode()
                    moved = below.up - up, below.down - down
                    one = Exchange(path, time.time(), not up, request[1], response[1], *moved)
                    self.exchanges.append(one)
                    up, down = below.up, below.down


def _next(raw: socket.socket, below: Counted, above: ssl.SSLSocket) -> tuple[bytes, bytes] | None:
    """The site's next request; None when the SuperLink has closed the connection.

    Raises EOFError when the site has.
    """
    while not below.waiting():
        ready, _, _ = select.select([raw, above], [], [])
        if raw in ready:
            break
        if _ended(above):
            return None
    return _message(below.recv)


def _ended(stream: ssl.SSLSocket) -> bool:
    """Whether what made this socket readable is its end; a session ticket is not."""
    stream.settimeout(0)
    try:
        return stream.recv(1) == b""
    except ssl.SSLWantReadError:
        return False
    finally:
        stream.settimeout(None)


def _message(recv: Callable[[int], bytes]) -> tuple[bytes, bytes]:
    """Head and body of one HTTP message. Raises EOFError if the stream ends before it does."""

    def more() -> bytes:
        if piece := recv(PIECE):
            return piece
        raise EOFError

    received = more()
    while b"\r\n\r\n" not in received:
        received += more()
    head, mark, body = received.partition(b"\r\n\r\n")
    sizes = re.findall(rb"(?im)^content-length: *(\d+)", head)
    if len(sizes) != 1:
        raise ValueError(f"a message without one content-length: {head!r}")
    while len(body) < int(sizes[0]):
        body += more()
    return head + mark, body
