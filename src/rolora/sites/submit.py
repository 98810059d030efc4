"""A run across sites from its user's side: submit it to Flower, follow it, raise its error.

The coordinator's app runs in a process that Flower starts on this machine. It shares a job folder,
beside the run folder, with the command that submitted it:

================= ============================================================
``config.toml``   from the command: the configuration
``order.json``    from the command: the run folder; rounds of a resumed run
``app/``          from the command: what Flower starts
``lock``          held while the app lives, whose process id is in ``pid``
``progress.log``  from the app: lines for the user
``outcome.json``  from the app when it ends: an exit code, and the error
================= ============================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from rolora.config.load import dump_config, read_toml
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError, DataError, NoQuorum, RoloraError
from rolora.files import from_home, is_locked, locked, write_file
from rolora.sites.folder import FederationFolder, flwr, own_programs_first

STARTS_WITHIN = 120.0  # seconds for Flower to start the app
ENDS_WITHIN = 15.0  # seconds for the app to end after SIGTERM
ERRORS = {error.exit_code: error for error in (RoloraError, ConfigError, DataError, NoQuorum)}

APP = """\
[project]
name = "rolora-run"
version = "1.0.0"
description = "One run of rolora"
license = { text = "Apache-2.0" }
dependencies = ["flwr>=1.41"]
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "rolora"
[tool.flwr.app.components]
serverapp = "rolora_apps:server"
clientapp = "rolora_apps:client"
[tool.flwr.app.config]
job = ""
"""
CODE = '''\
"""Every machine runs the rolora that is installed on it."""

from rolora.sites.apps import client, server

__all__ = ["client", "server"]
'''


def run_remotely(
    config: RunConfig, out: Path, notify: Callable[[str], None], rounds: int | None = None
) -> None:
    """Start or resume the run across the sites of ``federation.on``, and follow it to its end.

    ``notify`` receives lines to show. Raises the error that ended the coordinator's app, or
    RoloraError if it was killed; the run can then be resumed.
    """
    name, environment = _connection(str(config.federation.on), config.root)
    out = out.resolve()
    job = job_folder(out)
    if job.exists():
        if is_alive(job):
            raise ConfigError(f"{out} is already running (process {(job / 'pid').read_text()})")
        shutil.rmtree(job)
    job.mkdir(mode=0o700, parents=True)  # the configuration has the server's seed
    (job / "app").mkdir()
    try:
        write_file(job / "config.toml", dump_config(config, {}, job))
        write_file(job / "order.json", json.dumps({"out": str(out), "rounds": rounds}))
        (job / "progress.log").touch()
        write_file(job / "app" / "pyproject.toml", APP)
        write_file(job / "app" / "rolora_apps.py", CODE)
        command = ("run", str(job / "app"), name, "--run-config", f'job="{job}"')
        answer = flwr(command, environment)
        notify(f"submitted to the federation as run {answer['run-id']}")
        _follow(job, out, notify)
    finally:
        if not is_alive(job):
            shutil.rmtree(job, ignore_errors=True)


def job_folder(out: Path) -> Path:
    """The job folder of a run folder."""
    return out.with_name(f".{out.name}.job")


def is_alive(job: Path) -> bool:
    """Whether the app of this job is running."""
    return is_locked(job / "lock")


@contextlib.contextmanager
def reporting(job: Path) -> Iterator[TextIO]:
    """For the app: the file for its progress. Holds the lock, and writes the outcome at the end."""
    outcome: dict[str, object] = {"code": 1, "error": "the coordinator's app was interrupted"}
    with locked(job / "lock", wait=True), (job / "progress.log").open("a", buffering=1) as lines:
        write_file(job / "pid", str(os.getpid()))
        try:
            with contextlib.redirect_stderr(lines):
                yield lines
            outcome = {"code": 0}
        except RoloraError as error:
            outcome = {"code": error.exit_code, "error": str(error)}
            raise
        except Exception as error:
            outcome = {"code": 1, "error": repr(error)[:300]}
            raise
        finally:
            write_file(job / "outcome.json", json.dumps(outcome))


def _connection(on: str, root: Path) -> tuple[str, dict[str, str]]:
    """The SuperLink's name for Flower's command line, and the environment for it."""
    path = root / from_home(on)
    if path.is_dir() or os.sep in on:
        folder = FederationFolder.open(path)
        folder.require_served()
        return "rolora", folder.environment
    settings = from_home(os.environ.get("FLWR_HOME") or "~/.flwr") / "config.toml"
    known = read_toml(settings).get("superlink", {}) if settings.is_file() else {}
    if on not in known:
        raise ConfigError(
            f"{on} is neither a federation folder nor a SuperLink in {settings}: "
            "is --on, or federation.on, right?"
        )
    return on, own_programs_first()


def _follow(job: Path, out: Path, notify: Callable[[str], None]) -> None:
    """Pass on the app's progress until it has ended; raise the error that ended it."""
    until = time.monotonic() + STARTS_WITHIN
    outcome = job / "outcome.json"
    with (job / "progress.log").open() as progress:
        try:
            while True:
                ended = outcome.exists()  # asked before the lines are read, so that none is missed
                for line in progress:
                    notify(line.rstrip("\n"))
                if ended:
                    break
                if (job / "pid").exists():
                    if not is_alive(job) and not outcome.exists():
                        raise RoloraError(
                            "the coordinator's app was killed; finished rounds are saved, "
                            f"continue with: rolora resume {shlex.quote(str(out))}"
                        )
                elif time.monotonic() > until:
                    raise RoloraError(
                        f"the run was submitted but did not start within {STARTS_WITHIN:.0f} s: "
                        "rolora federation serve must be running, with the same Python as this "
                        f"command, as a user who may write in {job.parent}; see its superexec.log"
                    )
                time.sleep(0.3)
        except BaseException:
            _end(job)
            raise
    end = json.loads(outcome.read_text())
    if end["code"]:
        raise ERRORS.get(end["code"], RoloraError)(end["error"])


def _end(job: Path) -> None:
    """End the app and wait for it, so that the run can be resumed at once."""
    for number, seconds in ((signal.SIGTERM, ENDS_WITHIN), (signal.SIGKILL, 5.0)):
        until = time.monotonic() + seconds
        if (job / "pid").exists() and is_alive(job):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((job / "pid").read_text()), number)
        while is_alive(job) and time.monotonic() < until:
            time.sleep(0.1)
