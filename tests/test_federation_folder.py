"""The coordinator's folder and a site's file: a mistake is reported in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import rolora

from rolora.cli.printing import Interrupted
from rolora.config.load import make_config
from rolora.errors import ConfigError, RoloraError
from rolora.sites import folder as folders
from rolora.sites import serve as programs
from rolora.sites.flower_internals import Fleet
from rolora.sites.folder import FederationFolder
from rolora.sites.node import last_node
from rolora.sites.processes import running
from rolora.sites.serve import require_free
from rolora.sites.site_config import read_site
from rolora.sites.submit import run_remotely


@pytest.fixture
def federation(tmp_path: Path) -> FederationFolder:
    """Keys of a coordinator and of two sites; nothing serves it."""
    made = FederationFolder.create(tmp_path / "federation", "localhost", 8000)
    for name in ("ann", "bob"):
        made.add_site(name)
    (made.path / "state.db").touch()
    return made


def test_a_key_that_is_refused_is_named_and_keeps_no_other_site_out(
    federation: FederationFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flwr(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
        if "ann.pub" in arguments[2]:
            raise RoloraError("no key")
        return {"node-id": "7"}

    monkeypatch.setattr(folders, "flwr", flwr)
    told: list[str] = []
    assert not federation.register(told.append)
    assert len(told) == 2
    assert "public/ann.pub" in told[0]
    assert "bob" in told[1]
    assert json.loads((federation.path / "nodes.json").read_text()) == {"bob": "7"}


def test_a_site_whose_keys_were_only_half_made_can_be_added_again(
    federation: FederationFolder,
) -> None:
    public = federation.path / "public" / "bob.pub"
    public.unlink()
    with pytest.raises(ConfigError, match="'ann' has a key already"):
        federation.add_site("ann")
    site = federation.add_site("bob")
    assert public.read_bytes() == (site / "bob.pub").read_bytes()


def test_a_federation_s_folder_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's settings are in it before it has its name."""

    def full(path: Path, content: bytes | str, mode: int = 0) -> None:
        if path.name == "config.toml":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        FederationFolder.create(tmp_path / "federation", "localhost", 8000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"ann": 7}', '{"ann": "x"}', '{"ann": ""}', '{"../ann": "7"}', "[" * 99_999],
)
def test_a_damaged_list_of_nodes_is_named_and_gives_no_site_another_name(
    federation: FederationFolder, text: str
) -> None:
    (federation.path / "nodes.json").write_text(text)
    with pytest.raises(ConfigError, match=r"nodes\.json is damaged: restore it, or remove it"):
        federation.names()


def test_what_needs_a_served_federation_says_so_and_how(
    federation: FederationFolder, tmp_path: Path
) -> None:
    (federation.path / "nodes.json").write_text('{"ann": "7"}')
    with pytest.raises(ConfigError, match="rolora federation serve --folder"):
        federation.remove_site("ann")
    assert "ann" in federation.public
    with pytest.raises(ConfigError, match="rolora federation serve --folder"):
        run_remotely(across(federation.path), tmp_path / "run", print)


@pytest.mark.parametrize(
    "words",
    [
        ("site",),
        ("doctor", "site.toml"),
        ("federation", "keys", "--sites", "ann"),
        ("federation", "remove", "--sites", "ann"),
        ("federation", "serve"),
        ("federation", "up"),
        ("run", "--on", "federation"),
    ],
)
def test_a_command_across_sites_without_flower_says_what_to_install(
    words: tuple[str, ...],
    site: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("rolora.sites")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    code, _, err = rolora(monkeypatch, capsys, *words, *([site] if words[0] == "run" else []))
    said = "rolora: runs across sites need Flower: pip install 'rolora[flower]'"
    assert (code, err.splitlines()[-1]) == (2, said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_federation_that_is_interrupted_promises_no_saved_rounds(
    command: str,
    federation: FederationFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr("rolora.sites.serve.serve", stopped)
    code, _, err = rolora(monkeypatch, capsys, "federation", command, "--folder", federation.path)
    assert (code, err.splitlines()[-1]) == (130, "rolora: interrupted")


@pytest.mark.parametrize(
    ("ending", "ended"), [(Interrupted(), True), (RoloraError("the SuperLink ended"), False)]
)
def test_the_app_of_a_run_ends_with_an_interruption_and_not_with_a_failure(
    ending: BaseException,
    ended: bool,
    federation: FederationFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = tmp_path / "app"
    waits = ["sh", "-c", f"sleep 30 & echo $! > {app}; wait"]

    def watch(*_: object) -> None:
        while not (app.is_file() and app.read_text().endswith("\n")):
            time.sleep(0.01)
        raise ending

    monkeypatch.setattr(FederationFolder, "superlink", lambda self: ["sleep", "30"])
    monkeypatch.setattr(FederationFolder, "superexec", lambda self: waits)
    monkeypatch.setattr(FederationFolder, "register", lambda self, notify: True)
    monkeypatch.setattr(programs, "_wait_for", lambda folder, link: None)
    monkeypatch.setattr(programs, "_watch", watch)
    with pytest.raises(type(ending)):
        programs.serve(federation, print)
    state = Path("/proc") / app.read_text().strip() / "stat"
    until = time.monotonic() + 2
    while alive := state.exists() and state.read_text().split()[2] != "Z":
        if time.monotonic() > until or not ended:
            break
        time.sleep(0.01)
    if alive:
        os.kill(int(app.read_text()), signal.SIGKILL)
    assert alive is not ended


def test_that_all_sites_are_up_is_told_when_the_last_one_is_connected(
    federation: FederationFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy: list[Any] = ["busy", {"ann": "online", "bob": "offline"}]
    told, asked = watched(federation, tmp_path, monkeypatch, [*busy, ONLINE])
    assert (told, asked) == (["all sites are up"], [0, 5, 10])


def test_that_all_sites_are_up_is_never_told_after_one_has_ended(
    federation: FederationFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = watched(federation, tmp_path, monkeypatch, [ONLINE], ["sh", "-c", "echo why; false"])
    log = tmp_path / "bob.log"
    said = f"site bob ended with status 1: why ({log}): look at its log; "
    assert ended[0] == [f"{said}the others continue without it"]


def test_sites_that_do_not_connect_are_named_once_after_a_minute(
    federation: FederationFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [{"ann": "online", "bob": "registered"}] * 20
    told, asked = watched(federation, tmp_path, monkeypatch, [*answers, ONLINE])
    log = tmp_path / "bob.log"
    assert told == [
        f"not connected after 60 seconds: site bob ({log}); still waiting",
        "all sites are up",
    ]
    assert asked == [*range(0, 101, 5)]


ONLINE = {"ann": "online", "bob": "online"}


def watched(
    federation: FederationFolder,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[Any],
    bob: Sequence[str] = ("sleep", "30"),
) -> tuple[list[str], list[float]]:
    """What is said of the sites ann and bob within 120 seconds, and when the SuperLink was asked,
    which gives these answers."""
    told: list[str] = []
    asked: list[float] = []
    left, now = iter(answers), 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now > 120:
            raise Interrupted

    def status(folder: FederationFolder) -> Any:
        asked.append(now)
        if (answer := next(left)) == "busy":
            raise RoloraError(answer)
        return answer

    def joined() -> None:
        told.append("all sites are up")

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now)
    monkeypatch.setattr(FederationFolder, "status", status)
    monkeypatch.setattr(FederationFolder, "register", lambda self, notify: True)
    monkeypatch.setattr(programs, "time", clock)
    start = {"ann": ["sleep", "30"], "bob": bob}
    with ExitStack() as stack:
        sites = [
            stack.enter_context(running(f"site {name}", command, place / f"{name}.log", os.environ))
            for name, command in start.items()
        ]
        if bob[0] != "sleep":
            sites[1].process.wait()
        with pytest.raises(Interrupted):
            programs._watch(federation, sites[:1], sites, told.append, joined)
    return told, asked


def test_a_federation_that_is_neither_a_folder_nor_known_to_flower_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^federaton is neither a federation folder nor"):
        run_remotely(across("federaton"), tmp_path / "run", print)
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_told_before_anything_is_started() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on port {port}"):
            require_free(port)
    require_free(port)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('metrcs = ["loss"]', "unknown key 'metrcs': did you mean 'metrics'?"),
        (
            "text = { a = 1 }",
            "text: Input should be a valid string; or Input should be a valid list, got {'a': 1}",
        ),
        ("threads = 0", "threads: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_a_mistake_in_a_site_s_file_is_told_as_in_a_run_s(
    line: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "site.toml"
    file.write_text(f'name = "ann"\ndata = "rows.csv"\n{line}\n')
    with pytest.raises(ConfigError) as found:
        read_site(file)
    assert str(found.value) == f"{file}: {said}"


@pytest.mark.parametrize("wrong", ["nowhere.crt", "ann.key"])
def test_a_site_whose_certificate_is_none_is_told_which(
    wrong: str, federation: FederationFolder
) -> None:
    file = federation.path / "sites" / "ann" / "site.toml"
    file.write_text(file.read_text().replace("ca.crt", wrong))
    site = read_site(file)
    with pytest.raises(ConfigError, match=wrong), Fleet.join(site):
        pass


def across(on: Path | str) -> Any:
    values = {"model": {"path": "m"}, "data": {"train": "x"}, "federation": {"on": str(on)}}
    return make_config(values)


def test_a_process_goes_on_as_the_node_of_its_own_folder_and_not_of_a_copy(tmp_path: Path) -> None:
    own, copy = tmp_path / "own", tmp_path / "copy"
    own.mkdir()
    assert last_node(own) is None
    (own / "node").write_text(f"123 {own.stat().st_ino}")
    assert last_node(own) == 123
    shutil.copytree(own, copy)
    assert last_node(copy) is None


@pytest.mark.parametrize("name", ["a b", "../x", ".hidden", "", "x" * 65])
def test_a_name_that_no_site_may_have_is_refused_alike_in_both_places(
    name: str, federation: FederationFolder, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(repr(name))} is not a valid site name"):
        federation.add_site(name)
    (tmp_path / "site.toml").write_text(f'name = "{name}"\ndata = "rows.csv"\n')
    with pytest.raises(ConfigError, match=f"{re.escape(repr(name))} is not a valid site name"):
        read_site(tmp_path / "site.toml")


def test_a_program_that_ends_is_named_with_its_status_and_its_last_line(tmp_path: Path) -> None:
    code = "print('\\033[91mERROR\\033[0m : out of luck\\n'); raise SystemExit(3)"
    command = [sys.executable, "-c", code]
    with running("the SuperLink", command, tmp_path / "log", os.environ) as program:
        program.process.wait()
        assert program.fault() == (
            f"the SuperLink ended with status 3: ERROR : out of luck ({tmp_path / 'log'})"
        )


def test_a_program_ends_with_the_block_that_runs_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with running("a site", command, tmp_path / "log", os.environ) as program:
        assert program.fault() is None
    assert program.process.returncode == -signal.SIGTERM


def test_a_folder_that_is_no_federation_s_is_refused_with_the_command_that_makes_one(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"federation.toml is missing; make one with rolora fed"):
        FederationFolder.open(tmp_path)


@pytest.mark.parametrize(
    "text", ["port = 1", "host = 'h'", "host = 1\nport = 1", "host = 'h'\nport = '1'"]
)
def test_a_federation_s_folder_without_a_host_and_a_port_is_damaged(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "federation.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"federation.toml is damaged: it needs host and port"):
        FederationFolder.open(tmp_path)
