"""The coordinator's programs: the SuperLink, the SuperExec, and for trying also the sites."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rolora.durable import locked
from rolora.errors import ConfigError, RoloraError
from rolora.flower.folder import FederationFolder
from rolora.flower.supervise import Program, Supervisor

READY = 60.0  # seconds for the SuperLink to answer


@contextmanager
def serving(folder: FederationFolder, tell: Callable[[str], None]) -> Iterator[Supervisor]:
    """SuperLink and SuperExec, running and started again when they end, until this is left.

    Raises RoloraError if the SuperLink does not come up.
    """
    supervisor = Supervisor(tell)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder.lock))
        except BlockingIOError:
            raise ConfigError(f"{folder.path} is being served already") from None
        held.callback(supervisor.end)
        link = _program(folder, "superlink", folder.superlink())
        supervisor.add(link)
        wait_for(folder, link)
        for name in folder.register():
            tell(f"registered the key of site {name}")
        supervisor.add(_program(folder, "superexec", folder.superexec()))
        yield supervisor


def site_program(folder: FederationFolder, site: Path) -> Program:
    """``rolora site`` with this folder's site.toml, which ends when this process does."""
    command = [sys.executable, "-m", "rolora", "site", "--config", str(site / "site.toml")]
    command += ["--parent-pid", str(os.getpid())]
    return Program(f"site {site.name}", command, site / "site.log", folder.environment)


def keep(supervisor: Supervisor, folder: FederationFolder) -> None:
    """Watch until interrupted; keys that are added to the folder meanwhile are registered."""
    seen = set(folder.public)
    while True:
        supervisor.look()
        if set(folder.public) != seen:
            try:
                for name in folder.register():
                    supervisor.tell(f"registered the key of site {name}")
                seen = set(folder.public)
            except RoloraError as error:
                supervisor.tell(f"a key could not be registered, again in 10 s: {error}")
                time.sleep(9)
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
