"""The coordinator's programs: the SuperLink, the SuperExec, and for trying also the sites."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rolora.errors import ConfigError, RoloraError
from rolora.files import locked
from rolora.sites.folder import FederationFolder
from rolora.sites.supervise import Program, Supervisor

READY = 60.0  # seconds for the SuperLink to answer
AGAIN = 30.0  # seconds until keys that the SuperLink did not take are tried again


@contextmanager
def serving(folder: FederationFolder, tell: Callable[[str], None]) -> Iterator[Supervisor]:
    """SuperLink and SuperExec, running and started again when they end, until this is left.

    Raises ConfigError if the folder is served or its port taken, RoloraError if the SuperLink does
    not come up.
    """
    supervisor = Supervisor(tell)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder.lock))
        except BlockingIOError:
            raise ConfigError(f"{folder.path} is being served already") from None
        require_free(folder.port)
        held.callback(supervisor.end)
        link = _program(folder, "superlink", folder.superlink())
        supervisor.add(link)
        wait_for(folder, link)
        folder.register(tell)
        supervisor.add(_program(folder, "superexec", folder.superexec()))
        yield supervisor


def require_free(port: int) -> None:
    """ConfigError if another program listens on this port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the SuperLink does
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be served ({error.strerror}): is another program, or another "
                "federation, on it? rolora federation keys --port gives a new federation another"
            ) from None


def site_program(folder: FederationFolder, site: Path) -> Program:
    """``rolora site`` with this folder's site.toml, which ends when this process does."""
    command = [sys.executable, "-m", "rolora", "site", "--config", str(site / "site.toml")]
    command += ["--parent-pid", str(os.getpid())]
    return Program(f"site {site.name}", command, site / "site.log", folder.environment)


def keep(supervisor: Supervisor, folder: FederationFolder) -> None:
    """Watch until interrupted; keys that are added to the folder meanwhile are registered."""
    taken: set[str] = set()
    due = 0.0
    while True:
        supervisor.look()
        public = set(folder.public)
        if public != taken and time.monotonic() >= due:
            if folder.register(supervisor.tell):
                taken = public
            else:
                due = time.monotonic() + AGAIN
        time.sleep(1)


def wait_for(folder: FederationFolder, link: Program) -> None:
    """Return when the SuperLink answers. RoloraError if it ends or does not answer in time."""
    until = time.monotonic() + READY
    while True:
        try:
            folder.status()
            return
        except RoloraError as error:
            if link.process is None or link.process.poll() is not None:
                raise RoloraError(
                    f"the SuperLink ended: {link.last_line()[-200:]} ({link.log})"
                ) from None
            if time.monotonic() > until:
                raise RoloraError(f"the SuperLink does not answer: {error} ({link.log})") from None
        time.sleep(0.5)


def _program(folder: FederationFolder, name: str, command: Sequence[str]) -> Program:
    return Program(name, command, folder.path / f"{name}.log", folder.environment)
