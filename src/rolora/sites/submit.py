"""A run across sites, as its user sees it: hand it to Flower, follow it, get its outcome.

The coordinator's app runs in a process of Flower's on this machine. It and the command that
follows it share a folder beside the run's: the configuration goes in; lines for the user, the
outcome, and a lock that is held as long as the app lives come out.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rolora.config.load import dump_config, read_toml
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError, DataError, NoQuorum, RoloraError
from rolora.files import is_locked, locked, write_file
from rolora.sites.folder import FederationFolder, flwr

STARTS_WITHIN = 120.0  # seconds for Flower to start the app
ENDS_WITHIN = 15.0  # seconds for the app to end when it is asked to
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

from rolora.flower import apps

client = apps.client
server = apps.server
'''


@dataclass(frozen=True)
class JobFolder:
    """Where the coordinator's app and the command that follows it meet."""

    path: Path

    @classmethod
    def beside(cls, out: Path) -> JobFolder:
        """The one of a run folder."""
        return cls(out.with_name(f".{out.name}.job"))

    @property
    def config(self) -> Path:
        """The configuration to start from."""
        return self.path / "config.toml"

    @property
    def progress(self) -> Path:
        """Lines for the user."""
        return self.path / "progress.log"

    @property
    def pid(self) -> Path:
        """The app's process."""
        return self.path / "pid"

    @property
    def order(self) -> Path:
        """What is wanted: the run folder, and how many rounds a resumed run should have."""
        return self.path / "order.json"

    @property
    def outcome(self) -> Path:
        """How the app ended, if it did so by itself: an exit code, and what was wrong."""
        return self.path / "outcome.json"

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Hold the lock that says that the app lives, and write down how it ends."""
        with locked(self.path / "lock", wait=True):
            write_file(self.pid, str(os.getpid()))
            outcome: dict[str, object] = {"code": 1, "error": "it was ended from outside"}
            try:
                yield
                outcome = {"code": 0}
            except RoloraError as error:
                outcome = {"code": error.exit_code, "error": str(error)}
                raise
            except Exception as error:
                outcome = {"code": 1, "error": repr(error)[:300]}
                raise
            finally:
                write_file(self.outcome, json.dumps(outcome))

    def is_alive(self) -> bool:
        """Whether the app holds its lock."""
        return is_locked(self.path / "lock")


def run_remotely(
    config: RunConfig, out: Path, tell: Callable[[str], None], rounds: int | None = None
) -> None:
    """Start the run across the sites of ``federation.on``, or go on with it, and see it through.

    ``tell`` gets lines to show. Raises what the coordinator's app ended with; RoloraError if it was
    killed, in which case the run can be resumed.
    """
    if find_spec("flwr") is None:
        raise ConfigError("a run across sites needs Flower: pip install 'rolora[flower]'")
    name, environment = _connection(config)
    job = JobFolder.beside(out.resolve())
    if job.path.exists():
        if job.is_alive():
            raise ConfigError(f"{out} is being run already (process {job.pid.read_text()})")
        shutil.rmtree(job.path)
    job.path.mkdir(parents=True)
    try:
        write_file(job.config, dump_config(config, {"root": str(config.root)}))
        write_file(job.order, json.dumps({"out": str(out.resolve()), "rounds": rounds}))
        job.progress.touch()
        app = job.path / "app"
        app.mkdir()
        write_file(app / "pyproject.toml", APP)
        write_file(app / "rolora_apps.py", CODE)
        answer = flwr(("run", str(app), name, "--run-config", f'job="{job.path}"'), environment)
        tell(f"submitted to {config.federation.on} as run {answer['run-id']}")
        _follow(job, out, tell)
    finally:
        if not job.is_alive():
            shutil.rmtree(job.path, ignore_errors=True)


def _connection(config: RunConfig) -> tuple[str, dict[str, str]]:
    """The name by which Flower's command line knows the SuperLink, and its environment."""
    on = str(config.federation.on)
    path = config.root / Path(on).expanduser()
    if (path / "federation.toml").is_file():
        folder = FederationFolder.open(path)
        folder.require_served()
        return "rolora", folder.environment
    if path.is_dir() or os.sep in on:
        FederationFolder.open(path)  # says what is missing
    named = Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser() / "config.toml"
    known = read_toml(named).get("superlink", {}) if named.is_file() else {}
    if on not in known:
        raise ConfigError(
            f"{on} is no folder of rolora federation here, nor a SuperLink in {named}: "
            "is --on, or federation.on, right?"
        )
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return on, {**os.environ, "PATH": programs}


def _follow(job: JobFolder, out: Path, tell: Callable[[str], None]) -> None:
    """Pass on what the app says until it has ended; raise what it ended with."""
    until = time.monotonic() + STARTS_WITHIN
    with job.progress.open() as progress:
        try:
            while not job.outcome.exists():
                _pass_on(progress, tell)
                if job.pid.exists():
                    if not job.is_alive() and not job.outcome.exists():
                        raise RoloraError(
                            "the coordinator's app was killed; finished rounds are saved, go on "
                            f"with: rolora resume {shlex.quote(str(out))}"
                        )
                elif time.monotonic() > until:
                    raise RoloraError(
                        f"the run was submitted but not started within {STARTS_WITHIN:.0f} s: is a "
                        "SuperExec running (rolora federation serve starts one), with the same "
                        f"Python as this, by a user who may write in {job.path.parent}? Its "
                        "superexec.log says more"
                    )
                time.sleep(0.3)
        except BaseException:
            _end(job)
            raise
        _pass_on(progress, tell)
    outcome = json.loads(job.outcome.read_text())
    if outcome["code"]:
        raise ERRORS.get(outcome["code"], RoloraError)(outcome["error"])


def _end(job: JobFolder) -> None:
    """End the app, and wait for it, so that the run can be resumed at once."""
    for number, seconds in ((signal.SIGTERM, ENDS_WITHIN), (signal.SIGKILL, 5.0)):
        until = time.monotonic() + seconds
        if job.pid.exists() and job.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job.pid.read_text()), number)
        while job.is_alive() and time.monotonic() < until:
            time.sleep(0.1)


def _pass_on(progress: Iterator[str], tell: Callable[[str], None]) -> None:
    for line in progress:
        tell(line.rstrip("\n"))
