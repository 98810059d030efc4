"""The tap between sites and SuperLink counts what the kernel counts, and changes nothing."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.site_bytes import added_up
from benchmarks.wiretap import Exchange, Tap
from rolora.sites import keys


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with what was posted, twice."""

    protocol_version = "HTTP/1.1"
    timeout = 0.6  # then a connection on which nothing comes is closed

    def do_POST(self) -> None:
        body = 2 * self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[Tap]:
    keys.make_authority(tmp_path, "test")
    keys.make_server(tmp_path, "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Tap(tmp_path, server.server_port) as opened:
        yield opened
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def connected(tap: Tap, folder: Path) -> Iterator[http.client.HTTPSConnection]:
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    connection = http.client.HTTPSConnection("127.0.0.1", tap.port, context=context)
    connection.connect()
    yield connection
    connection.close()


def posted(connection: http.client.HTTPSConnection, path: str, body: bytes) -> bytes:
    connection.request("POST", path, body)
    return connection.getresponse().read()


def of_the_kernel(connection: http.client.HTTPSConnection) -> tuple[int, int]:
    """Bytes sent and received on this socket, as Linux counts them (struct tcp_info)."""
    info = connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    acked, received = struct.unpack_from("=QQ", info, 120)
    return acked - 1, received  # the first acknowledged byte is the connection's opening


def test_bytes_of_a_stream_are_those_that_the_kernel_counts(tap: Tap, tmp_path: Path) -> None:
    with connected(tap, tmp_path) as connection:
        for size in (0, 3, 200_000):
            assert posted(connection, f"/{size}", size * b"x") == 2 * size * b"x"
        while len(tap.exchanges) < 3:  # it writes down what it has passed on
            time.sleep(0.01)
        up = sum(one.stream_up for one in tap.exchanges)
        down = sum(one.stream_down for one in tap.exchanges)
        assert (up, down) == of_the_kernel(connection)


def test_an_exchange_has_its_path_its_bodies_and_first_of_all_the_handshake(
    tap: Tap, tmp_path: Path
) -> None:
    start = time.time()
    with connected(tap, tmp_path) as connection:
        posted(connection, "/one", b"abc")
        posted(connection, "/two", b"abc")
        while len(tap.exchanges) < 2:
            time.sleep(0.01)
    one, two = tap.between(start, time.time())
    assert [(one.path, one.first), (two.path, two.first)] == [("/one", True), ("/two", False)]
    assert [(e.body_up, e.body_down) for e in (one, two)] == 2 * [(b"abc", b"abcabc")]
    assert one.stream_down > two.stream_down + 500, "a certificate went down with the first"


def test_a_connection_that_the_server_closes_is_closed_at_the_site(
    tap: Tap, tmp_path: Path
) -> None:
    with connected(tap, tmp_path) as connection:
        posted(connection, "/one", b"abc")
        connection.sock.settimeout(5)
        assert connection.sock.recv(1) == b""


def exchange(path: str, up: bytes, down: bytes, first: bool = False) -> Exchange:
    """One with a hundred bytes of heads and TLS each way."""
    return Exchange(f"/v1/fleet/{path}", 0.0, first, up, down, len(up) + 100, len(down) + 100)


ROUND = [
    exchange("pull-messages", b"1", b"", first=True),
    exchange("pull-messages", b"1", b"12"),
    exchange("pull-object", b"1", b"1234567"),
    exchange("confirm-message-received", b"1", b""),
    exchange("send-node-heartbeat", b"1", b"1"),
    exchange("push-messages", b"12345", b"1"),
    exchange("push-object", b"123456", b"1"),
]


def test_a_look_that_brings_nothing_is_no_part_of_a_question() -> None:
    found = added_up(ROUND, 1)
    assert found["question"] == {"message": 9, "stream": 9 + 3 + 3 * 200}
    assert found["answer"] == {"message": 11, "stream": 11 + 2 + 2 * 200}
    assert (found["looks_a_round"], found["connections_a_round"]) == (1, 1)
    assert found["all"] == 12 + 13 + 3 + 7 * 200


def test_a_message_too_many_is_not_averaged_away() -> None:
    with pytest.raises(ValueError, match="expected 2 of each"):
        added_up([*ROUND, *ROUND, ROUND[1]], 2)
