"""``rolora watch``: one page that follows a run, for this machine's browsers alone."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rolora.config.load import load_config
from rolora.errors import ConfigError
from rolora.report.live import events, live_server
from rolora.report.page import render
from rolora.results.runs import load_run
from rolora.run import runs

pytestmark = pytest.mark.usefixtures("quick")


@contextmanager
def served(path: Path) -> Iterator[int]:
    """The port of a server of this run's page."""
    with live_server(path, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def get(port: int, path: str, host: str | None = None, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def whole(site: Path, tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("whole") / "run"
    list(runs.start(load_config(site), path).rounds())
    return path


def test_the_page_is_the_report_as_it_is_now(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "<b>run"
    started = runs.start(load_config(site), path)
    with served(path) as port:
        assert "&lt;b&gt;run has no evaluated round yet" in get(port, "/page")[1]
        rounds = started.rounds()
        for _ in range(3):
            next(rounds)
        before = sorted(path.rglob("*"))
        status, page = get(port, "/page")
        assert (status, page) == (200, render([load_run(path)]))
        assert sorted(path.rglob("*")) == before  # it is only read
        assert "No run is finished" in page
        list(rounds)
        assert get(port, "/page")[1] == render([load_run(path)]) != page
        with (path / "rounds.jsonl").open("a") as file:
            file.write('{"round": 5, "met')  # as it may be read while it is written
        assert "line 6 is not valid JSON" in get(port, "/page")[1]


def test_events_say_how_far_the_run_is_and_when_it_ends(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rolora.report.live.EVERY", 0.01)
    monkeypatch.setattr("rolora.report.live.BEAT", 0.0)
    path = tmp_path / "run"
    rounds = runs.start(load_config(site), path).rounds()
    told = events(path)
    assert next(told).startswith("tiny: not finished, round 0 of 4; continue with: rolora resume")
    for _ in range(2):
        next(rounds)
    assert next(told) == "tiny: running, round 1 of 4"
    assert next(told) == ""  # nothing is new
    list(rounds)
    assert next(told) == "tiny: finished, 4 rounds"


def test_a_browser_is_told_of_a_round_by_an_event(whole: Path) -> None:
    with served(whole) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/events")
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        line = answer.readline().decode()
        connection.close()
    assert json.loads(line.removeprefix("data: ")) == "tiny: finished, 4 rounds"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("localhost:80", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:80", 421),
        ("localhost.evil.example", 421),
        ("", 421),
        ("[::1", 421),
    ],
)
def test_a_name_that_another_domain_could_point_here_is_refused(
    whole: Path, host: str, status: int
) -> None:
    with served(whole) as port:
        assert get(port, "/", host)[0] == status


def test_nothing_but_the_page_can_be_read_and_nothing_written(whole: Path) -> None:
    with served(whole) as port:
        for path in ("/config.toml", "/../run/config.toml", "/page/..", "/page?x=/etc/passwd"):
            assert get(port, path)[0] == 404
        assert get(port, "/page", method="POST")[0] == 501
        assert get(port, "/page", method="DELETE")[0] == 501


def test_the_frame_runs_its_own_script_alone(whole: Path) -> None:
    with served(whole) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/")
        answer = connection.getresponse()
        policy = answer.headers["Content-Security-Policy"]
        assert "new EventSource" in answer.read().decode()
        connection.close()
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_an_address_of_ipv6_is_served(whole: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with live_server(whole, "::1", 0) as server:
        assert server.server_address[0] == "::1"


def test_what_cannot_be_served_is_refused_in_one_line(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        live_server(tmp_path, "127.0.0.1", 0)
    with pytest.raises(ConfigError, match="--host is empty"):
        live_server(whole, "", 0)
    with served(whole) as port, pytest.raises(ConfigError, match="choose another --port"):
        live_server(whole, "127.0.0.1", port)
