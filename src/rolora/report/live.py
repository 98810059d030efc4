"""A run's report served to a browser, which shows it again after each round.

Three addresses: ``/`` is a frame around ``/page``, the report as it is now; the frame asks
``/state`` every few seconds how far the run is, and loads the page again when that has changed.
Only GET, and nothing that a request says is looked up on the disk.
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
from collections.abc import Callable, Mapping
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

READS = 3  # a line may be half written when it is read


class _Server(ThreadingHTTPServer):
    daemon_threads = True

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
    def page(version: str) -> str:
        return _page(path)

    @lru_cache(maxsize=1)
    def state(version: str) -> str:
        return json.dumps({"version": version, "text": _state(path)})

    def drawn() -> str:
        with drawing:
            return page(_version(path))

    frame = Path(__file__).with_name("live.html").read_text(encoding="utf-8")
    answers = {
        "/": ("text/html", lambda: frame),
        "/page": ("text/html", drawn),
        "/state": ("application/json", lambda: state(_version(path))),
    }
    try:
        return _Server(host, port, _handler(host, frame, answers))
    except OSError as error:
        raise ConfigError(
            f"cannot serve on {host}:{port} ({error.strerror or error}): choose another --port, or "
            "--host"
        ) from None


def _state(path: Path) -> str:
    """How far the run is, and how to continue one that has stopped."""
    one = listed(path)
    stopped = one.state == "not finished"
    hint = f"; continue with: rolora resume {quote(str(path))}" if stopped else ""
    return f"{one.name or path.name}: {one.how_far}{hint}"


def _version(path: Path) -> str:
    """What changes whenever the page about this run does."""
    found: list[object] = [is_locked(path / ".lock")]
    for name in ("config.toml", "rounds.jsonl", "diverged.txt", "report.html"):
        try:
            about = (path / name).stat()
            found += [about.st_mtime_ns, about.st_size]
        except OSError:
            found.append(name)
    return repr(found)


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
    host: str, frame: str, answers: Mapping[str, tuple[str, Callable[[], str]]]
) -> type[BaseHTTPRequestHandler]:
    """A handler of requests; ``answers``: address -> the type of its content, and the content."""
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
            elif self.path not in answers:
                self.send_error(404)
            else:
                kind, content = answers[self.path]
                text = content()
                self.send_response(200)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Security-Policy", policy)
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.send_header("Referrer-Policy", "no-referrer")
                self.end_headers()
                self.wfile.write(text.encode())

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
