"""A run's report served to a browser, which shows it again after each round.

Three addresses: ``/`` is a frame around ``/page``, the report as it is now; ``/events`` tells the
frame, by server-sent events, how far the run is and so when to load the page again. Only GET, and
nothing that a request says is looked up on the disk.
"""

from __future__ import annotations

import base64
import hashlib
import html
import ipaddress
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import urlsplit

from rolora.errors import ConfigError, DataError
from rolora.files import is_locked
from rolora.report.page import render
from rolora.results.listing import listed
from rolora.results.runs import load_run

EVERY = 3.0  # seconds between looks at the run's folder: drawing the page takes about one
BEAT = 15.0  # seconds after which a silent stream says that it is there, to notice who has left
READS = 3  # a line may be half written when it is read

Version = tuple[object, ...]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # streams of events end with the process

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of browsers that have left."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def live_server(path: Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server of the page about the run in folder ``path``; ``serve_forever`` runs it.

    A request must name ``host``, "localhost" or an address: a name in another domain could be
    pointed here by its owner, whose pages could then read this one. ConfigError if ``path`` is no
    run folder, or the port cannot be used.
    """
    if not all((path / name).is_file() for name in ("config.toml", "rounds.jsonl")):
        raise ConfigError(f"{path} is not a run folder, or its run has not started yet")
    if not host:  # to a socket, every address that this machine has
        raise ConfigError("--host is empty: name an address, 0.0.0.0 for every one of this machine")
    drawing = threading.Lock()  # matplotlib draws one figure at a time

    @lru_cache(maxsize=1)
    def drawn(version: Version) -> str:
        return _page(path)

    def page() -> str:
        with drawing:
            return drawn(_version(path))

    frame = Path(__file__).with_name("live.html").read_text(encoding="utf-8")
    try:
        return _Server(host, port, _handler(host, frame, page, lambda: events(path)))
    except OSError as error:
        raise ConfigError(
            f"cannot serve on {host}:{port} ({error.strerror or error}): choose another --port, or "
            "--host"
        ) from None


def events(path: Path) -> Iterator[str]:
    """How far the run is, now and whenever its folder has changed; "" where nothing has for long.

    Never ends.
    """
    last: Version = ()
    said = 0.0
    while True:
        if (version := _version(path)) != last:
            last, said = version, time.monotonic()
            one = listed(path)
            hint = (
                f"; continue with: rolora resume {quote(str(path))}"
                if one.state == "not finished"
                else ""
            )
            yield f"{one.name or path.name}: {one.how_far}{hint}"
        elif time.monotonic() > said + BEAT:
            said = time.monotonic()
            yield ""
        time.sleep(EVERY)


def _version(path: Path) -> Version:
    """What changes whenever the page about this run does."""
    found: list[object] = [is_locked(path / ".lock")]
    for name in ("config.toml", "rounds.jsonl", "diverged.txt", "report.html"):
        try:
            about = (path / name).stat()
            found += [about.st_mtime_ns, about.st_size]
        except OSError:
            found.append(name)
    return tuple(found)


def _page(path: Path) -> str:
    """The report; before there is anything to report, or if the folder is damaged, why not."""
    said = ""
    for _ in range(READS):
        try:
            return render([load_run(path)])
        except (ConfigError, DataError) as error:
            said = str(error)
            time.sleep(0.1)
    return f'<!doctype html><meta charset="utf-8"><title>rolora</title><p>{html.escape(said)}</p>'


def _handler(
    host: str, frame: str, page: Callable[[], str], told: Callable[[], Iterator[str]]
) -> type[BaseHTTPRequestHandler]:
    script = re.findall(r"<script>(.*?)</script>", frame, re.DOTALL)[0]
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{known}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; frame-src 'self'; img-src data:; frame-ancestors 'self'"
    )

    class Handler(BaseHTTPRequestHandler):
        """Answers GET requests."""

        def do_GET(self) -> None:
            """Send one of the three."""
            if not _is_ours(self.headers.get("Host", ""), host):
                self.send_error(421, "this name is not served here")
            elif self.path == "/":
                self._send(frame)
            elif self.path == "/page":
                self._send(page())
            elif self.path == "/events":
                self._head("text/event-stream")
                self._stream()
            else:
                self.send_error(404)

        def _head(self, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Security-Policy", policy)
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()

        def _send(self, text: str) -> None:
            self._head("text/html")
            self.wfile.write(text.encode())

        def _stream(self) -> None:
            for text in told():
                event = f"data: {json.dumps(text)}\n\n" if text else ": still here\n\n"
                self.wfile.write(event.encode())
                self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler


def _is_ours(given: str, host: str) -> bool:
    """Whether a Host header names this server in a way that no other domain can be made to."""
    name = ""
    try:
        name = urlsplit(f"//{given}").hostname or ""
        ipaddress.ip_address(name)
        return True
    except ValueError:  # no address, or no name at all
        return name != "" and name in ("localhost", host.lower())
