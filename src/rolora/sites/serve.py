"""The coordinator's programs: SuperLink, SuperExec, and in a trial also the sites.

They run and end together. Nothing is restarted here: systemd does that (deploy/). The app of a
running run survives a failure, but not an interruption, and continues with the next SuperLink.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from rolora.errors import ConfigError, RoloraError
from rolora.files import locked
from rolora.sites.folder import FederationFolder
from rolora.sites.logs import bound
from rolora.sites.processes import Program, running

READY_WITHIN = 60.0  # seconds for the SuperLink to answer
REGISTER_AGAIN = 30.0  # seconds until keys that the SuperLink refused are tried again
ASK_AGAIN = 5.0  # seconds until the SuperLink, which is a process each time, is asked for its sites
CONNECTS_WITHIN = 60.0  # seconds until sites that are not connected are named


def serve(
    folder: FederationFolder,
    notify: Callable[[str], None],
    sites: Sequence[str] = (),
    joined: Callable[[], None] | None = None,
) -> None:
    """Run the federation, and the processes of these ``sites``, until interrupted.

    ``notify`` receives lines to show, such as that a site has ended. ``joined`` is called once,
    when all of ``sites`` are connected and none has ended. If the SuperLink or the SuperExec ends,
    the others are ended too and RoloraError is raised. Raises ConfigError if the folder is being
    served already or its port is taken.
    """
    environment = folder.environment

    def start(name: str, command: Sequence[str], log: Path) -> Program:
        return stack.enter_context(running(name, command, log, environment))

    with ExitStack() as stack:
        stack.enter_context(locked(folder.lock))
        for port in (folder.port, folder.control):
            require_free(port)
        link = start("the SuperLink", folder.superlink(), folder.path / "superlink.log")
        _wait_for(folder, link)
        folder.register(notify)
        executor = start("the SuperExec", folder.superexec(), folder.path / "superexec.log")
        trial = []
        for name in sites:
            place = folder.path / "sites" / name
            command = [sys.executable, "-m", "rolora", "site", "--config", str(place / "site.toml")]
            command += ["--parent-pid", str(os.getpid())]
            trial.append(start(f"site {name}", command, place / "site.log"))
        notify(f"serving {folder.host}:{folder.port}; start runs on it with: --on {folder.path}")
        try:
            _watch(folder, [link, executor], trial, notify, joined)
        except BaseException as ending:
            if not isinstance(ending, Exception):  # an interruption, under whatever name
                os.killpg(executor.process.pid, signal.SIGTERM)  # with the app of a run under way
            raise


def _watch(
    folder: FederationFolder,
    needed: Sequence[Program],
    sites: Sequence[Program],
    notify: Callable[[str], None],
    joined: Callable[[], None] | None = None,
) -> None:
    """Register keys that are added to the folder, until a needed program has ended."""
    registered: set[str] = set()
    due = ask = 0.0
    late = time.monotonic() + CONNECTS_WITHIN
    alive = list(sites)
    while True:
        for program in needed:
            if fault := program.fault():
                raise RoloraError(fault)
        for site in [site for site in alive if site.fault()]:
            alive.remove(site)
            notify(f"{site.fault()}: look at its log; the others continue without it")
        for program in (*needed, *sites):
            bound(program.log)
        public = set(folder.public)
        if public != registered and time.monotonic() >= due:
            if folder.register(notify):
                registered = public
            else:
                due = time.monotonic() + REGISTER_AGAIN
        now = time.monotonic()
        if joined is not None and len(alive) == len(sites) and now >= ask:
            if not (missing := _missing(folder, sites)):
                joined()
                joined = None
            elif now >= late:
                names = ", ".join(f"{site.name} ({site.log})" for site in missing)
                notify(f"not connected after {CONNECTS_WITHIN:.0f} seconds: {names}; still waiting")
                late = math.inf
            ask = now + ASK_AGAIN
        time.sleep(1)


def _missing(folder: FederationFolder, sites: Sequence[Program]) -> list[Program]:
    """The sites that are not connected; all of them where the SuperLink does not say."""
    try:
        status = folder.status()
    except RoloraError:
        return list(sites)
    online = {f"site {name}" for name, now in status.items() if now == "online"}
    return [site for site in sites if site.name not in online]


def require_free(port: int) -> None:
    """ConfigError if another program listens on this port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the SuperLink does
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on port {port} ({error.strerror}): is another program, or another "
                "federation, using it? rolora federation keys --port sets a new federation's"
            ) from None


def _wait_for(folder: FederationFolder, link: Program) -> None:
    """Return when the SuperLink answers. RoloraError if it ends or does not answer in time."""
    until = time.monotonic() + READY_WITHIN
    while True:
        try:
            folder.status()
            return
        except RoloraError as error:
            if fault := link.fault():
                raise RoloraError(fault) from None
            if time.monotonic() > until:
                raise RoloraError(f"the SuperLink does not answer: {error} ({link.log})") from None
        time.sleep(0.5)
