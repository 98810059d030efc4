"""Claims about asking whether the hub is_reachable."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import transformers

from rolora.errors import ConfigError
from rolora.model import checkpoint
from rolora.model.peft import LoraSettings
from rolora.network import is_reachable
from rolora.plan.meta_model import outline


class NotFound(BaseHTTPRequestHandler):
    """A server that has nothing."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), NotFound) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_a_hub_that_has_nothing_there_answers_all_the_same(server: str) -> None:
    assert is_reachable(server)


def test_no_network_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transformers.utils.hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"is not on this machine, and the hub does not answer"):
        outline("nobody/nothing", "causal_lm", LoraSettings())
    assert time.monotonic() - started < 5


def test_a_hub_is_not_asked_where_its_client_is_told_to_be_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(checkpoint, "is_reachable", lambda _: pytest.fail("asked"))
    with pytest.raises(ConfigError, match=r"is not on this machine"):
        outline("nobody/nothing", "causal_lm", LoraSettings())
