"""Whoever reaches the coordinator's port: what is refused, and that nothing of it is read."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from calls import calls, configuration, make_place
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.constant import ACCESS_TOKEN_STORE_KEY
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.supercore.constant import TASK_TYPE_TO_APPIO_API_ADDRESS_ARG, TASK_TYPE_TO_COMMAND
from flwr.supercore.credential_store.file_credential_store import FileCredentialStore
from flwr.supercore.date import now
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.superlink.main import create_app
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from loopback import free_port, until

from rolora.algorithm.codec import body_bytes
from rolora.errors import ConfigError, RoloraError
from rolora.flower.message import SiteMessage
from rolora.run import runs
from rolora.sites import flower_internals, serve, superlink
from rolora.sites.coordinator import across
from rolora.sites.expected import expecting, largest
from rolora.sites.flower_internals import NOT_REGISTERED, NOT_SIGNED, ONLY_SITES, unsigned
from rolora.sites.folder import FederationFolder
from rolora.sites.gate import leave
from rolora.sites.keys import public_pem
from rolora.sites.logs import KEPT, LARGEST, bound, escape_records
from rolora.sites.site_config import read_site
from rolora.sites.superlink import SMALL, App, Scope, by_port, for_control, for_sites

ACTIVATE, PUSH = "/v1/fleet/activate-node", "/v1/fleet/push-object"
CONTROL_ROUTE, RUNTIME_ROUTE = "/v1/control/start-run", "/v1/runtime/push-object"
PUBLIC_PORT, CONTROL_PORT = 8000, 8001
SECRET = b"5ec3e7"
Body = Callable[[], Awaitable[Scope]]


@dataclass
class Inner:
    """What is behind the gate: it reads the body and answers 200."""

    bodies: list[bytes] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Body, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def asked(
    app: App,
    path: str,
    *chunks: bytes | None,
    method: str = "POST",
    port: int = PUBLIC_PORT,
    headers: Mapping[str, str] = {},
) -> tuple[int, bytes, dict[bytes, bytes]]:
    """Status, body and headers of the answer. Reading a chunk that is None fails the test."""
    left, answer = list(chunks), list[Scope]()

    async def receive() -> Scope:
        chunk = left.pop(0)
        if chunk is None:
            pytest.fail("the body was read")
        return {"type": "http.request", "body": chunk, "more_body": bool(left)}

    async def send(message: Scope) -> None:
        answer.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "client": ("127.0.0.1", 5000),
        "server": ("10.0.0.1", port),
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
    }
    asyncio.run(app(scope, receive, send))
    start, *bodies = answer
    return start["status"], b"".join(b["body"] for b in bodies), dict(start["headers"])


def gate(inner: App, refused: str | None = None, largest: int = 0) -> App:
    """The gate of both listeners, of a federation in which all are signed, or none."""

    async def unsigned(headers: Any) -> str | None:
        return refused

    sites = for_sites(inner, unsigned, lambda: largest)
    return by_port(sites, for_control(inner, SECRET), CONTROL_PORT)


def declared(size: int) -> dict[str, str]:
    return {"content-length": str(size)}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CONTROL_ROUTE),
        ("POST", RUNTIME_ROUTE),
        ("POST", "/v1/fleet/register-node"),
        ("POST", "/v1/fleet/unregister-node"),
        ("POST", "/v1/fleet/push-object/"),
        ("POST", "/v1/fleet/new-in-flower-1.43"),
        ("GET", PUSH),
        ("POST", "/rolora"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/health"),
        ("POST", "/v1/responses"),
    ],
)
def test_another_machine_reaches_the_sites_routes_and_nothing_else(method: str, path: str) -> None:
    inner = Inner()
    status, said, _ = asked(gate(inner), path, None, method=method)
    assert (status, said.decode().strip()) == (403, ONLY_SITES)
    assert inner.bodies == []


def test_a_websocket_reaches_nothing() -> None:
    async def fail(*_: Any) -> Any:
        pytest.fail("it was passed on")

    for port in (PUBLIC_PORT, CONTROL_PORT):
        scope = {"type": "websocket", "path": PUSH, "headers": [], "server": ("", port)}
        asyncio.run(gate(fail)(scope, fail, fail))


@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded", "x-real-ip", "host"])
@pytest.mark.parametrize("claim", ["127.0.0.1", "for=127.0.0.1;host=localhost", "[::1]:8001"])
def test_no_claim_of_an_address_opens_control(name: str, claim: str) -> None:
    inner = Inner()
    headers = {name: claim, "authorization": f"Bearer {SECRET.decode()}"}
    assert asked(gate(inner), CONTROL_ROUTE, None, headers=headers)[0] == 403
    assert inner.bodies == []


def test_the_server_believes_no_proxy_and_listens_for_control_on_this_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Server:
        def __init__(self, config: Any) -> None:
            made.append(config)

        def run(self, sockets: Any) -> None:
            made.extend(one.getsockname() for one in sockets)
            for one in sockets:
                one.close()

    folder = FederationFolder.create(tmp_path / "federation", "coord.example", free_port())
    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setattr(superlink, "superlink", lambda arguments: Inner())
    monkeypatch.setattr(superlink, "end_with_parent", lambda parent: None)
    monkeypatch.setattr(superlink, "escape_records", lambda: None)
    monkeypatch.setattr(sys, "argv", folder.superlink()[2:])
    superlink.main()
    config, public, control = made
    assert not config.proxy_headers
    assert config.http == "h11"
    assert config.ws == "none"
    assert config.ssl_certfile
    assert public[0] == "0.0.0.0"
    assert control == ("127.0.0.1", public[1] + 1)


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", "Bearer 5ec3e7x", "5ec3e7"])
def test_control_needs_the_secret_before_a_body_is_read(given: str | None) -> None:
    inner = Inner()
    headers = {} if given is None else {"authorization": given}
    status, _, _ = asked(gate(inner), CONTROL_ROUTE, None, port=CONTROL_PORT, headers=headers)
    assert status == 401
    assert inner.bodies == []


def test_control_with_the_secret_and_the_runtime_api_are_served_to_this_machine_alone() -> None:
    inner = Inner()
    known = {"authorization": f"Bearer {SECRET.decode()}"}
    assert asked(gate(inner), CONTROL_ROUTE, b"run", port=CONTROL_PORT, headers=known)[0] == 200
    assert asked(gate(inner), RUNTIME_ROUTE, b"push", port=CONTROL_PORT)[0] == 200
    assert inner.bodies == [b"run", b"push"]
    for path in (PUSH, "/docs", "/health", "/v1/responses"):
        assert asked(gate(inner), path, None, port=CONTROL_PORT, headers=known)[0] == 403


def test_a_request_that_is_not_signed_is_refused_unread_and_a_large_one_cut_off() -> None:
    inner = Inner()
    for size, closes in ((9, False), (SMALL + 1, True)):
        refused = gate(inner, NOT_REGISTERED, largest=10**9)
        status, said, headers = asked(refused, PUSH, None, headers=declared(size))
        assert (status, said.decode().strip()) == (401, NOT_REGISTERED)
        assert (headers.get(b"connection") == b"close") is closes
    streamed = asked(refused, PUSH, None, headers={"transfer-encoding": "chunked"})
    assert streamed[2][b"connection"] == b"close"
    assert inner.bodies == []


def test_a_body_that_is_declared_too_large_is_refused_unread() -> None:
    inner = Inner()
    for expects in (0, 10_000_000):
        limit = SMALL + int(1.1 * expects)
        passes = gate(inner, largest=expects)
        assert asked(passes, PUSH, None, headers=declared(limit + 1))[0] == 413
        assert asked(passes, PUSH, b"x" * limit, headers=declared(limit))[0] == 200
    assert [len(body) for body in inner.bodies] == [SMALL, SMALL + 11_000_000]


@pytest.mark.parametrize(
    "headers",
    [
        {"transfer-encoding": "chunked"},
        {"transfer-encoding": "chunked", "content-length": "10"},
        {"content-length": "10"},
        {"content-length": "-1"},
        {"content-length": "9" * 5000},
    ],
)
def test_a_body_that_streams_past_the_limit_is_read_no_further(headers: dict[str, str]) -> None:
    inner, half = Inner(), bytes(SMALL // 2)
    assert asked(gate(inner), PUSH, half, half, b"x", None, headers=headers)[0] == 413
    assert inner.bodies == []
    streamed = asked(gate(inner), PUSH, half, half, headers={"transfer-encoding": "chunked"})
    assert streamed[0] == 200
    assert inner.bodies == [2 * half]


@dataclass
class Fleet:
    """Flower's own app behind the gate, and one registered key."""

    app: Any
    key: ec.EllipticCurvePrivateKey
    node: int

    def signed(self, key: ec.EllipticCurvePrivateKey | None = None) -> dict[str, str]:
        """The headers with which Flower's client would send a request that this key signs."""
        key = key or self.key
        request = httpx.Request(
            "POST", "https://x", headers={"content-type": "application/protobuf"}
        )
        context = ProtobufRequestContext("", ActivateNodeRequest(), request)
        NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, lambda _: Any)
        return {k: v for k, v in request.headers.items() if k == "content-type" or "flwr" in k}

    def activated(self, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """The answer to a request to go online with this fleet's key."""
        content = ActivateNodeRequest(public_key=public_pem(self.key), heartbeat_interval=30)
        gate = for_sites(self.app, unsigned(self.app), lambda: 0)
        return asked(gate, ACTIVATE, content.SerializeToString(), headers=headers)[:2]


@pytest.fixture
def fleet() -> Fleet:
    app, key = create_app(), ec.generate_private_key(ec.SECP384R1())
    app.state.enable_supernode_auth = True
    state = app.state.linkstate_factory.state()
    return Fleet(app, key, state.create_node("none", "none", public_pem(key), 0))


def test_an_honest_request_passes_the_gate_and_flower_answers_it(fleet: Fleet) -> None:
    status, answer = fleet.activated(fleet.signed())
    assert status == 200
    assert ActivateNodeResponse.FromString(answer).node_id == fleet.node


def test_a_key_that_is_not_registered_is_told_so_however_well_it_signs(fleet: Fleet) -> None:
    stranger = ec.generate_private_key(ec.SECP384R1())
    assert fleet.activated(fleet.signed(stranger)) == (401, f"{NOT_REGISTERED}\n".encode())


def test_a_signature_that_is_missing_wrong_or_stale_is_refused(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = fleet.signed()
    stranger = fleet.signed(ec.generate_private_key(ec.SECP384R1()))
    public, timestamp, signature = sorted(good.keys() - {"content-type"}, key=kind)
    wrong = {
        "none": {"content-type": good["content-type"]},
        "of another key": {**stranger, public: good[public]},
        "of another time": {**good, timestamp: good[timestamp].replace("T", " ")},
        "no base64": {**good, signature: "?"},
        "no time": {**good, timestamp: "yesterday"},
        "a time without its zone": {**good, timestamp: good[timestamp][:19]},
        "no key": {**good, public: base64.b64encode(b"key").decode()},
    }
    for what, headers in wrong.items():
        status, said = fleet.activated(headers)
        assert status == 401, what
        assert said.decode().strip() == (NOT_REGISTERED if what == "no key" else NOT_SIGNED)
    for hours in (-1, 1):
        monkeypatch.setattr(
            flower_internals, "now", lambda hours=hours: now() + timedelta(hours=hours)
        )
        assert fleet.activated(good) == (401, f"{NOT_SIGNED}\n".encode())


def kind(name: str) -> int:
    """Public key, time, signature, in this order."""
    return ["key", "time", "sign"].index(next(w for w in ("key", "time", "sign") if w in name))


def test_a_run_s_messages_count_while_its_process_lives(tmp_path: Path) -> None:
    assert largest(tmp_path) == 0
    with expecting(tmp_path) as expect:
        expect(7)
        expect(5)
        assert largest(tmp_path) == 5
        (tmp_path / "expected" / "999999999").write_text("10000")
        assert largest(tmp_path) == 5, "that process is dead"
        killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        (tmp_path / "expected" / str(killed.pid)).write_text("9")
        assert largest(tmp_path) == 9
        killed.kill()
        until(lambda: largest(tmp_path) == 5, 10, "its end, of which nobody has asked")
        killed.communicate()
        (tmp_path / "expected" / str(killed.pid)).unlink()
        (tmp_path / "expected" / str(os.getppid())).write_text("6")
        assert largest(tmp_path) == 6
    assert sorted(file.name for file in (tmp_path / "expected").iterdir()) == sorted(
        ["999999999", str(os.getppid())]
    )
    with expecting(tmp_path):
        assert not (tmp_path / "expected" / "999999999").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("method", "up"),
    [
        ("rolora", "int4"),
        ("flora", "fp32"),
        ("ravan", "bf16"),
        ("lora_a2", "fp32"),
    ],
)
def test_the_gate_is_told_before_each_round_what_its_largest_update_has(
    method: str, up: str, tmp_path: Path
) -> None:
    place = make_place(tmp_path)
    transport, told = calls(place, tmp_path / "sites"), list[int]()

    def expect(size: int) -> None:
        assert len(told) == len({q.integer("round") for q in questions("train")})
        told.append(size)

    def questions(ask: str) -> list[SiteMessage]:
        return [question for _, question, _ in transport.passed if question.head["ask"] == ask]

    ranks = 'lora.rank={"site-ann" = 3, "*" = 2}'
    config = configuration(
        place,
        f"method.name={method}",
        f"wire.up={up}",
        "train.rounds=2",
        "train.participation=1.0",
        ranks if method == "flora" else "lora.rank=2",
    )
    build = across(transport, transport.notified.append, expect=expect)
    for _ in runs.start(config, tmp_path / "run", build).rounds():
        continue
    sent: dict[int, int] = {}
    for _, question, reply in transport.passed:
        if question.head["ask"] == "train" and reply.body:
            round = question.integer("round")
            sent[round] = max(sent.get(round, 0), body_bytes(reply.body))
    assert len(told) == len(sent) == 2
    if method == "lora_a2":
        assert all(size <= largest + 100 for size, largest in zip(sent.values(), told, strict=True))
    else:
        assert list(sent.values()) == told


def test_the_gate_s_process_has_no_torch() -> None:
    code = "import sys, rolora.sites.superlink; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_new_federation_s_secret_is_in_two_files_that_its_owner_alone_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FederationFolder.create(tmp_path / "federation", "localhost", 8000)
    secret = (folder.path / "control.secret").read_bytes()
    assert len(secret) == 64
    for name in ("control.secret", "flwr/credentials.yaml", "ca.key", "server.key"):
        assert (folder.path / name).stat().st_mode & 0o777 == 0o600, name
    stored = FileCredentialStore(folder.path / "flwr" / "credentials.yaml")
    assert stored.get(ACCESS_TOKEN_STORE_KEY % f"127.0.0.1:{folder.control}") == secret
    for command in (folder.superlink(), folder.superexec()):
        assert secret.decode() not in " ".join(command)
    assert str(secret) not in str(folder.environment)


@pytest.mark.parametrize("port", [0, 65535, -1])
def test_a_port_without_a_next_one_for_control_is_refused(port: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"port {port} is not between 1 and 65534"):
        FederationFolder.create(tmp_path / "federation", "localhost", port)
    assert not list(tmp_path.iterdir())


def test_a_run_s_token_is_in_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "app"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(tmp_path / 'said')!r}, 'w').write("
        "repr(sys.argv) + open(sys.argv[sys.argv.index('--token-file') + 1]).read())\n"
    )
    program.chmod(0o700)
    spec = SimpleNamespace(
        task_type="app",
        runtime_api_address="127.0.0.1:8001",
        token="70c3",
        root_certificates_path="ca.crt",
        parent_pid=1,
    )
    monkeypatch.setitem(TASK_TYPE_TO_COMMAND, "app", str(program))
    monkeypatch.setitem(TASK_TYPE_TO_APPIO_API_ADDRESS_ARG, "app", "--address")
    assert flower_internals.start_task(spec).wait() == 0
    arguments, token = (tmp_path / "said").read_text().rsplit("]", 1)
    assert token == "70c3"
    assert "70c3" not in arguments
    assert "'--address', '127.0.0.1:8001'" in arguments


@pytest.mark.parametrize("host", ["coord.example", "10.0.0.1", "[2001:db8::1]", "127.example"])
def test_a_site_goes_to_no_other_machine_without_tls(host: str, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    plain = f'name = "ann"\ndata = "rows.csv"\nsuperlink = "{host}:8000"\n'
    file.write_text(plain)
    with pytest.raises(ConfigError, match="without TLS") as found:
        read_site(file)
    assert len(str(found.value).splitlines()) == 1
    file.write_text(f'{plain}certificates = "ca.crt"\n')
    assert read_site(file).superlink == f"{host}:8000"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "[::1]"])
def test_on_this_machine_a_site_may_do_without_tls(host: str, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(f'name = "ann"\ndata = "rows.csv"\nsuperlink = "{host}:8000"\n')
    assert read_site(file).certificates is None


HOSTILE = "\x1b[2J\r\nERROR: you were robbed\u2028\x07"


@pytest.fixture
def logged() -> Iterator[Callable[[], str]]:
    """A logger's output so far, of records that are escaped."""
    usual, stream = logging.getLogRecordFactory(), io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("hostile")
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.addHandler(handler)
    escape_records()
    yield stream.getvalue
    logging.setLogRecordFactory(usual)
    logger.removeHandler(handler)


def test_a_record_is_one_printable_line_whatever_it_quotes(logged: Callable[[], str]) -> None:
    logger = logging.getLogger("hostile")
    logger.warning("it said %s", HOSTILE)
    logger.warning(HOSTILE)
    logger.warning("wrong %d", "number")
    lines = logged().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("WARNING: ") and line.isprintable() for line in lines)


def test_a_traceback_s_lines_are_printable_and_indented(logged: Callable[[], str]) -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("hostile").exception("it failed")
    first, *others = logged().splitlines()
    assert first == "ERROR: it failed"
    assert len(others) > 3
    assert all(line.startswith("  ") and line.isprintable() for line in others)


def test_a_log_begins_anew_when_it_is_large_and_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    bound(log, 10)
    with log.open("ab") as writer:
        for number in range(KEPT + 3):
            writer.write(b"%10d\n" % number)
            writer.flush()
            bound(log, 10)
            assert log.read_bytes() == b""
        writer.write(b"last")
    bound(log, 10)
    assert log.read_bytes() == b"last"
    kept = sorted(tmp_path.glob("superlink.log.*"))
    assert [int(file.read_text()) for file in kept] == [7, 6, 5, 4, 3]


def test_what_a_site_notes_of_its_answers_stays_bounded(tmp_path: Path) -> None:
    site = calls(tmp_path, tmp_path / "sites").sites[10].config
    leave(site, "ready", "a" * 8, SiteMessage({"error": "rows"}))
    log = site.folder / "outgoing.log"
    os.truncate(log, LARGEST + 1)
    leave(site, "ready", "b" * 8, SiteMessage({"error": "rows"}))
    assert [json.loads(line)["run"] for line in log.read_text().splitlines()] == ["b" * 8]
    assert "aaaaaaaa" in log.with_name("outgoing.log.1").read_text()


def test_what_the_programs_of_a_federation_write_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    logs = [tmp_path / name for name in ("superlink.log", "superexec.log", "site.log")]
    for log in logs:
        log.touch()
        os.truncate(log, LARGEST + 1)
    faults = iter([None, "it ended"])
    link, executor, site = (
        SimpleNamespace(log=log, fault=fault)
        for log, fault in zip(logs, (lambda: next(faults), lambda: None, lambda: None), strict=True)
    )
    folder: Any = SimpleNamespace(public={})
    needed: Any = [link, executor]
    sites: Any = [site]
    with pytest.raises(RoloraError, match="it ended"):
        serve._watch(folder, needed, sites, print)
    assert [log.stat().st_size for log in logs] == [0, 0, 0]
