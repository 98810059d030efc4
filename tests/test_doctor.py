"""Claims about rolora doctor: each thing that is wrong is one line that says what to do."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from loopback import free_port
from tiny import tiny_bert
from tiny_site import write_rows

from rolora.cli import sites as commands
from rolora.config.load import make_config
from rolora.errors import RoloraError
from rolora.flower.versions import PROTOCOL, versions
from rolora.sites import keys
from rolora.sites.doctor import examine_site
from rolora.sites.policy import Uses
from rolora.sites.site_config import SiteConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's folder: rows, model, key, and the certificate authority that it trusts."""
    folder = tmp_path_factory.mktemp("site")
    tiny_bert(folder / "model")
    write_rows(folder / "rows.csv", 20)
    keys.make_authority(folder, "here")
    keys.make_server(folder, "127.0.0.1")
    keys.make_site(folder, "ann")
    return folder


def site(place: Path, **fields: Any) -> SiteConfig:
    given = {"name": "ann", "data": "rows.csv", "certificates": "ca.crt", "key": "ann.key"}
    given |= {"text": "text", "label": "label"}
    return SiteConfig.model_validate({**given, "root": place, "state": "state", **fields})


def run(place: Path) -> str:
    values = {
        "offline": True,
        "model": {"path": "model", "dtype": "fp32"},
        "data": {"train": "x", "test": "y"},
        "lora": {"target_modules": ["query"]},
    }
    return make_config(values, root=place).model_dump_json(exclude_none=True)


@contextmanager
def coordinator(
    certificates: Path | None, body: bytes = b"", ahead: timedelta = timedelta()
) -> Iterator[str]:
    """Something that answers over TLS like a coordinator; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", format_datetime(datetime.now(UTC) + ahead, usegmt=True))
            self.end_headers()
            self.wfile.write(body or json.dumps(versions()).encode())

        def do_POST(self) -> None:
            self.send_error(401)

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Answer)
    if certificates is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def bad(settings: SiteConfig, config: str | None = None) -> dict[str, str]:
    """What is found to be wrong; each in one line."""
    found = {one.what: one.detail for one in examine_site(settings, config) if not one.good}
    assert all("\n" not in detail for detail in found.values())
    return found


def looked_at(settings: SiteConfig, config: str | None = None) -> dict[str, str]:
    return {one.what: one.detail for one in examine_site(settings, config) if one.good}


def test_nothing_listening_is_told_with_what_to_start(place: Path) -> None:
    found = bad(site(place, superlink=f"127.0.0.1:{free_port()}"))
    assert "is rolora federation serve running there?" in found["superlink"]


def test_a_name_that_is_no_machine_is_told(place: Path) -> None:
    found = bad(site(place, superlink="no-such-machine.invalid:8000"))
    assert "no machine is called 'no-such-machine.invalid'" in found["superlink"]


def test_an_address_without_a_port_is_told(place: Path) -> None:
    assert "host:port" in bad(site(place, superlink="coordinator"))["superlink"]


def test_another_authority_is_told(place: Path, tmp_path: Path) -> None:
    keys.make_authority(tmp_path, "elsewhere")
    keys.make_server(tmp_path, "127.0.0.1")
    with coordinator(tmp_path) as address:
        found = bad(site(place, superlink=address))
    assert "signed by another CA" in found["superlink"]


def test_a_certificate_for_another_name_is_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ca.crt", "ca.key"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    monkeypatch.setattr(keys, "LOOPBACK", ())
    keys.make_server(tmp_path, "elsewhere.example")
    with coordinator(tmp_path) as address:
        found = bad(site(place, superlink=address))
    assert "is not for '127.0.0.1': make it with --host 127.0.0.1" in found["superlink"]


def test_a_coordinator_without_tls_is_told(place: Path) -> None:
    with coordinator(None) as address:
        found = bad(site(place, superlink=address))
    assert "no TLS" in found["superlink"]


@pytest.mark.parametrize(("ahead", "said"), [(600, "behind"), (-600, "ahead of")])
def test_clocks_that_differ_by_more_than_a_signature_lasts_are_told(
    ahead: int, said: str, place: Path
) -> None:
    with coordinator(place, ahead=timedelta(seconds=ahead)) as address:
        found = bad(site(place, superlink=address))
    assert f"s {said} the SuperLink's: set both by NTP" in found["superlink"]


def test_another_protocol_is_wrong_and_another_version_is_told(place: Path) -> None:
    old = {**versions(), "protocol": PROTOCOL + 1}
    with coordinator(place, json.dumps(old).encode()) as address:
        found = bad(site(place, superlink=address))
    assert f"protocol {PROTOCOL + 1} there, {PROTOCOL} here" in found["coordinator"]
    assert "install the same version of rolora" in found["coordinator"]
    with coordinator(place, json.dumps({**versions(), "torch": "2.0.0"}).encode()) as address:
        settings = site(place, superlink=address)
        assert "coordinator" not in bad(settings)
        assert "torch 2.0.0 there" in looked_at(settings)["coordinator"]


@pytest.mark.parametrize("body", [b"<html>", b"[" * 5000, b'{"a": 1, "a": 2}', b"[1]", b'"\xff"'])
def test_a_coordinator_that_says_no_versions_is_no_fault(body: bytes, place: Path) -> None:
    with coordinator(place, body) as address:
        settings = site(place, superlink=address)
        assert "does not report its versions" in looked_at(settings)["coordinator"]


def test_what_a_coordinator_says_commands_no_terminal(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {**versions(), "torch": "\x1b[2J\nok   superlink"}
    refused = pytest.raises(RoloraError, match="connection")
    with coordinator(place, json.dumps(said).encode()) as address, refused:
        commands._examine_site(site(place, superlink=address), None, as_json=False)
    printed = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in printed)
    assert sum("superlink" in line[:20] for line in printed) == 1


def test_a_refused_key_is_told(place: Path) -> None:
    with coordinator(place) as address:
        found = bad(site(place, superlink=address))
    assert "refused" in found["connection"]


def test_a_key_that_others_can_read_is_told(place: Path) -> None:
    (place / "ann.key").chmod(0o644)
    try:
        found = bad(site(place, superlink=f"127.0.0.1:{free_port()}"))
    finally:
        (place / "ann.key").chmod(0o600)
    assert "chmod 600" in found["key"]


@pytest.mark.parametrize(
    ("fields", "what", "said"),
    [
        ({"data": "none.csv"}, "rows", "none.csv"),
        ({"text": None, "label": None}, "roles", 'text = "text"'),
        ({"text": None}, "run", 'write text = "COLUMN" in site.toml'),
        ({"tasks": ["regression"]}, "run", 'write tasks = ["regression", "classification"]'),
        ({"label": "text", "max_labels": 2}, "run", "is 'text' the column of labels?"),
        ({"labels": ["good", "bad"]}, "run", "the label 'cat' is not among labels"),
        ({"min_train_rows": 21}, "run", "would train on 20 of 20 rows, and min_train_rows is 21"),
        ({"label": "outcome"}, "rows", "'outcome'"),
        ({"model": "nowhere/model"}, "model", "nowhere/model"),
        ({"base": "0123456789ab"}, "model", "expected base 0123456789ab"),
    ],
)
def test_rows_and_model_are_tried_on_the_run_s_configuration(
    fields: dict[str, Any], what: str, said: str, place: Path
) -> None:
    settings = site(place, superlink=f"127.0.0.1:{free_port()}", **fields)
    assert said in bad(settings, run(place))[what]


def test_what_is_as_it_should_be_is_told_too_and_nothing_is_left_behind(place: Path) -> None:
    with coordinator(place) as address:
        found = looked_at(site(place, superlink=address), run(place))
    assert {
        "versions",
        "rows",
        "roles",
        "labels",
        "model",
        "memory",
        "key",
        "ca.crt",
    } <= found.keys()
    assert found["labels"] == "bad, cat, good"
    assert not (place / "state").exists()


def test_each_limit_of_a_site_is_shown_with_what_runs_have_used_of_it(
    place: Path, tmp_path: Path
) -> None:
    limits = {"max_runs": 3, "max_questions": 40, "max_rounds": 7, "max_rank": 16}
    settings = site(place, state=str(tmp_path), superlink="nowhere", **limits)
    found = looked_at(settings)
    assert found["runs"] == "0 of 3 answered (max_runs)"
    assert found["questions"] == "0 of 40 answered in any run (max_questions)"
    assert not (tmp_path / "uses.json").exists()
    config = make_config(json.loads(run(place)), ["train.rounds=5"], root=place)
    for name, questions in (("aaaaaaaa", 2), ("bbbbbbbb", 40)):
        uses = Uses.read(settings)
        uses.admit(name, config, 20)
        for _ in range(questions - 1):
            uses.count(name)
    found = looked_at(settings)
    assert found["runs"] == "2 of 3 answered (max_runs)"
    assert found["questions"] == "40 of 40 answered in run bbbbbbbb, the most (max_questions)"
    assert found["sizes"] == (
        "max_rounds 7, max_steps 10,000, max_batch 1,024, max_rank 16, min_train_rows 10, "
        "min_score_rows 10"
    )
    Uses.read(settings).admit("cccccccc", config, 20)
    said = bad(settings)["runs"]
    assert said == "3 of 3 answered (max_runs): a new run is refused until you raise it"


def test_counts_that_cannot_be_read_are_told(place: Path, tmp_path: Path) -> None:
    (tmp_path / "uses.json").write_text("{")
    found = bad(site(place, state=str(tmp_path), superlink="nowhere"))
    assert "uses.json is damaged: restore it, or remove it" in found["runs"]
