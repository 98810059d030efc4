"""Claims about uploading an adapter folder, with a small server in the hub's place."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import transformers
from test_cli import rolora
from test_export import as_gguf, logits, trained
from tiny import tiny_llama

pytestmark = pytest.mark.usefixtures("quick")


class Hub(ThreadingHTTPServer):
    """A hub with one account, ``ann``, who has written access to ``ward`` too."""

    private: dict[str, bool]
    files: dict[str, bytes]
    role = "write"


class Answers(BaseHTTPRequestHandler):
    """What the hub answers to the requests of an upload."""

    server: Hub

    def do_HEAD(self) -> None:
        self.answer(200)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if self.headers["Authorization"] != "Bearer secret":
            self.answer(401, error="Invalid credentials")
        elif self.path == "/api/whoami-v2":
            self.answer(200, name="ann", type="user", orgs=[{"name": "ward"}])
        elif name in self.server.private:
            self.answer(200, id=name, private=self.server.private[name], siblings=[])
        else:
            self.answer(404, "RepoNotFound", error="Repository not found")

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.role != "write":
            self.answer(403, error="this token may read only")
        elif self.path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            self.server.private[name] = asked.get("private") or asked["visibility"] == "private"
            self.answer(200, url=name)
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(sent)["files"]]
            each = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, files=[{"path": one, **each} for one in names])
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            commit = f"{huggingface_hub.constants.ENDPOINT}/ann/cats/commit/1"
            self.answer(200, commitUrl=commit, commitOid="1", success=True)
        else:
            self.answer(200, errors=[], warnings=[])

    def answer(self, status: int, code: str = "", **said: Any) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Hub(("127.0.0.1", 0), Answers) as made:
        made.private, made.files = {}, {}
        threading.Thread(target=made.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{made.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)  # as HF_ENDPOINT does
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def run(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with samples; its base is a folder whose place is nobody's business."""
    return trained(tmp_path_factory.mktemp("secret-place"), "causal_lm")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answers the question with this text."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_an_upload_is_announced_asked_for_and_is_the_adapter_in_a_new_private_repository(
    hub: Hub,
    run: Path,
    answer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer("y\n")
    code, out, err = rolora(monkeypatch, capsys, "export", run, "--push", "ann/cats", "--json")
    place = huggingface_hub.constants.ENDPOINT
    assert code == 0, err
    assert (code, json.loads(out)) == (0, {"pushed": f"{place}/ann/cats"})
    assert f"to       {place}/ann/cats, a new private repository, which only ann can read" in err
    size = sum(map(len, hub.files.values())) / 1e6
    told = f"upload   {len(hub.files)} files, {size:.2f} MB, of {run / 'adapter'}: "
    assert told + ", ".join(sorted(hub.files)) in err
    assert hub.private == {"ann/cats": True}

    got = tmp_path / "got"
    got.mkdir()
    for name, content in hub.files.items():
        (got / name).write_bytes(content)
    base = transformers.AutoModelForCausalLM.from_pretrained(run.parent / "model")
    found = logits(peft.PeftModel.from_pretrained(base, got), got)
    base = transformers.AutoModelForCausalLM.from_pretrained(run.parent / "model")
    wanted = logits(peft.PeftModel.from_pretrained(base, run / "adapter"), run / "adapter")
    assert found.equal(wanted)


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_nothing_that_is_uploaded_names_a_folder_a_file_of_rows_or_a_client(
    hub: Hub,
    kind: str,
    answer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "secret-place"
    place.mkdir()
    own = trained(place, kind, "hetlora", rank={"client-*": 4})
    (own / "adapter" / ".hidden").write_text("rows.jsonl")
    answer("y\n")
    assert rolora(monkeypatch, capsys, "export", own, "--push", "ward/cats")[0] == 0
    assert hub.files.keys() >= {"README.md", "adapter_model.safetensors", "tokenizer.json"}
    assert hub.files.keys().isdisjoint({"rolora.json", ".hidden", "samples.json"})
    for name, content in hub.files.items():
        for word in (b"secret-place", str(Path.home()).encode() + b"/", b"rows.jsonl", b"client-"):
            assert word not in content, name
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "model"


def test_a_repository_that_exists_keeps_its_visibility_and_that_is_said(
    hub: Hub,
    run: Path,
    answer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.private = {"ann/open": False, "ward/closed": True}
    for name, said in {
        "ann/open": "a PUBLIC repository that exists, which anyone can read",
        "ward/closed": "a private repository that exists, which members of ward read",
    }.items():
        answer("n\n")
        code, _, err = rolora(monkeypatch, capsys, "export", run, "--push", name)
        assert said in err
        assert (code, hub.files) == (1, {})
    answer("")  # no one there to answer
    assert rolora(monkeypatch, capsys, "export", run, "--push", "ann/new")[0] == 1
    assert (hub.files, hub.private) == ({}, {"ann/open": False, "ward/closed": True})
    answer("y\n")
    assert rolora(monkeypatch, capsys, "export", run, "--push", "ann/open")[0] == 0
    assert hub.files
    assert hub.private["ann/open"] is False


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cats", "--push cats: give USER/REPOSITORY"),
        ("a/b/c", "--push a/b/c: give USER/REPOSITORY"),
        ("ann/a--b", "--push ann/a--b: Cannot have -- or .."),
        ("bob/cats", "the token is of ann, who is not a member of 'bob'"),
    ],
)
def test_a_name_that_cannot_be_uploaded_to_is_one_line_and_asks_nothing(
    hub: Hub,
    run: Path,
    name: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, _, err = rolora(monkeypatch, capsys, "export", run, "--push", name)
    (line,) = (line for line in err.splitlines() if line != "asking the hub ...")
    assert (found, hub.files, hub.private) == (2, {}, {})
    assert said in line


def test_no_network_no_token_and_a_token_without_rights_are_each_one_line(
    hub: Hub,
    run: Path,
    answer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*more: object) -> tuple[int, str]:
        code, _, err = rolora(monkeypatch, capsys, "export", run, "--push", "ann/cats", *more)
        return code, err.splitlines()[-1]

    hub.role = "read"
    answer("y\n")
    refused = "rolora: the hub refuses the token for ann/cats: make one with write access"
    code, line = said()
    assert (code, line.endswith("or set HF_TOKEN")) == (2, True)
    assert refused in line
    monkeypatch.setenv("HF_TOKEN", "wrong")
    code, line = said()
    assert (code, line.startswith(refused)) == (2, True)
    monkeypatch.delenv("HF_TOKEN")
    missing = "rolora: the hub's token is missing: run hf auth login, or set HF_TOKEN"
    assert said() == (2, missing)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, line = said()
    assert (code, line.endswith("does not answer: nothing was uploaded")) == (1, True)
    both = "rolora: --push uploads the adapter folder as it is: leave out other options"
    assert said("--gguf", "x.gguf") == (2, both)
    assert hub.files == {}


def test_a_run_that_has_not_finished_has_nothing_to_upload(
    hub: Hub,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("adapter"))
    code, _, err = rolora(monkeypatch, capsys, "export", tmp_path / "run", "--push", "ann/cats")
    assert code == 2
    assert "finish its run with: rolora resume" in err


def test_of_a_gguf_base_the_file_is_named(
    hub: Hub,
    answer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_llama(tmp_path / "model")
    as_gguf(tmp_path / "model", tmp_path / "base.gguf")
    own = trained(tmp_path, "causal_lm", base="base.gguf")
    answer("y\n")
    assert rolora(monkeypatch, capsys, "export", own, "--push", "ann/cats")[0] == 0
    settings = json.loads(hub.files["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "base.gguf"
