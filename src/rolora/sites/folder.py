"""A federation's folder at the coordinator: keys, the SuperLink's database, its logs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from rolora.config.load import read_toml
from rolora.errors import ConfigError, RoloraError
from rolora.files import is_locked, new_folder, write_file
from rolora.sites import keys
from rolora.sites.site_config import site_name

PORT = 8000

SITE = """\
# What this site brings to every run. Try it with: rolora site --config site.toml --check
name = "{name}"
data = "rows.csv"          # this site's rows: csv, jsonl, parquet or a datasets folder
# columns = ["text", "label"]   # all that a run may read; left out: whatever is in the file
# model = "models/base"    # the base model here; left out: what the run's configuration says
# text = "text"            # columns here; left out: the run's
# label = "label"
# device = "cuda"
superlink = "{host}:{port}"
certificates = "ca.crt"
key = "{name}.key"
"""


@dataclass(frozen=True)
class FederationFolder:
    """What ``rolora federation keys`` makes. Everything in it is for the coordinator alone, but
    each ``sites/NAME`` folder, which is for that site."""

    path: Path
    host: str
    port: int

    @classmethod
    def open(cls, path: Path) -> FederationFolder:
        """The folder at ``path``. ConfigError if it is none."""
        file = path / "federation.toml"
        if not file.is_file():
            raise ConfigError(
                f"{path} is no federation (no federation.toml in it): make one with "
                f"rolora federation keys --folder {path} --host HOST --sites NAME,NAME"
            )
        values = read_toml(file)
        host, port = values.get("host"), values.get("port")
        if not isinstance(host, str) or type(port) is not int:
            raise ConfigError(f"{file} is damaged: it needs a host and a port")
        return cls(path.resolve(), host, port)

    @classmethod
    def create(cls, path: Path, host: str, port: int) -> FederationFolder:
        """A new folder with a certificate authority and the server's certificate for ``host``."""
        if path.exists():
            raise ConfigError(f"{path} exists and is never overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(path) as part:
            part.chmod(0o700)
            keys.make_authority(part, "rolora federation")
            keys.make_server(part, [host])
            (part / "sites").mkdir()
            (part / "public").mkdir()
            write_file(part / "federation.toml", tomli_w.dumps({"host": host, "port": port}))
        folder = cls(path.resolve(), host, port)
        folder.home.mkdir()
        connection = {"address": folder.address, "root-certificates": str(folder.path / "ca.crt")}
        write_file(
            folder.home / "config.toml",
            tomli_w.dumps({"superlink": {"default": "rolora", "rolora": connection}}),
        )
        return folder

    @property
    def address(self) -> str:
        """Where the coordinator's own processes find the SuperLink."""
        return f"127.0.0.1:{self.port}"

    @property
    def lock(self) -> Path:
        """Held by the process that serves this federation."""
        return self.path / "serve.lock"

    @property
    def home(self) -> Path:
        """Flower's own configuration and apps."""
        return self.path / "flwr"

    @property
    def public(self) -> dict[str, Path]:
        """Site name -> its public key."""
        return {file.stem: file for file in sorted((self.path / "public").glob("*.pub"))}

    def add_site(self, name: str) -> Path:
        """Keys for one more site; the folder to hand to it. ConfigError if it has some."""
        try:
            site_name(name)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        public, site = self.path / "public" / f"{name}.pub", self.path / "sites" / name
        if public.exists() or site.exists():
            raise ConfigError(f"site {name!r} has a key already: {public}")
        with new_folder(site) as part:
            keys.make_site(part / f"{name}.key", part / f"{name}.pub")
            shutil.copy(self.path / "ca.crt", part / "ca.crt")
            text = SITE.format(name=name, host=self.host, port=self.port)
            write_file(part / "site.toml", text)
        shutil.copy(site / f"{name}.pub", public)
        return site

    def remove_site(self, name: str) -> None:
        """Have a running SuperLink refuse this site's key from now on. ConfigError if it has none.

        The folder that was handed to it goes too, so that the name can be given again.
        """
        public = self.path / "public" / f"{name}.pub"
        if not public.exists():
            listed = ", ".join(self.public) or "none"
            raise ConfigError(f"no site is called {name!r}; there are: {listed}")
        known = self._known()
        if name in known:
            self.require_served()
            flwr(("supernode", "unregister", known.pop(name), "rolora"), self.environment)
            write_file(self.path / "nodes.json", json.dumps(known))
        public.unlink()
        shutil.rmtree(self.path / "sites" / name, ignore_errors=True)

    def require_served(self) -> None:
        """ConfigError if no process serves this federation."""
        if not is_locked(self.lock):
            raise ConfigError(
                f"nothing serves {self.path}: rolora federation serve --folder {self.path}"
            )

    @property
    def environment(self) -> dict[str, str]:
        """For Flower's programs: nothing is installed at run time, nobody is told of the use."""
        programs = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
        }

    def superlink(self) -> list[str]:
        """The command that serves the SuperLink, so that its state survives it."""
        everywhere = "127.0.0.1" if self.host in keys.LOOPBACK else "0.0.0.0"
        return [
            *(sys.executable, "-m", "rolora.sites.superlink"),
            *("--host", everywhere, "--port", str(self.port)),
            *("--ssl-ca-certfile", str(self.path / "ca.crt")),
            *("--ssl-certfile", str(self.path / "server.crt")),
            *("--ssl-keyfile", str(self.path / "server.key")),
            *("--isolation", "process", "--database", str(self.path / "state.db")),
            *("--superexec-auth-secret-file", str(self.secret)),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        ]

    def superexec(self) -> list[str]:
        """The command that runs the coordinator's part of a run."""
        return [
            *(str(Path(sys.executable).parent / "flower-superexec"),),
            *("--runtime-api-address", self.address),
            *("--root-certificates", str(self.path / "ca.crt")),
            *("--superexec-auth-secret-file", str(self.secret)),
            *("--parent-pid", str(os.getpid())),
        ]

    @property
    def secret(self) -> Path:
        """What lets the SuperExec take runs from the SuperLink."""
        file = self.path / "superexec.secret"
        if not file.exists():
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as new:
                new.write(os.urandom(32).hex().encode())
        return file

    def register(self, tell: Callable[[str], None]) -> bool:
        """Tell a running SuperLink of the sites it does not know; whether it took all of them.

        ``tell`` gets a line for each. A key that is refused keeps no other site out.
        """
        known, all_taken = self._known(), True
        for name, public in self.public.items():
            if name in known:
                continue
            register = ("supernode", "register", str(public), "rolora", "--name", name)
            try:
                known[name] = str(flwr(register, self.environment)["node-id"])
            except RoloraError as error:
                tell(f"the key of site {name} ({public}) could not be registered: {error}")
                all_taken = False
                continue
            write_file(self.path / "nodes.json", json.dumps(known))
            tell(f"registered the key of site {name}")
        return all_taken

    def status(self) -> dict[str, str]:
        """Site name -> what a running SuperLink says of it: online, offline, registered."""
        listed = flwr(("supernode", "list", "rolora"), self.environment)["nodes"]
        status = {node["node-id"]: str(node["status"]) for node in listed}
        return {name: status.get(id, "unknown") for name, id in self._known().items()}

    def _known(self) -> dict[str, str]:
        """Site name -> node id, of the sites that the SuperLink's database holds."""
        file = self.path / "nodes.json"
        if not file.exists() or not (self.path / "state.db").exists():
            return {}
        return dict(json.loads(file.read_text()))


def flwr(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What Flower's command line answers, as JSON. RoloraError in one line where it fails."""
    command = [str(Path(sys.executable).parent / "flwr"), *arguments, "--format", "json"]
    done = subprocess.run(
        command,
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    start = done.stdout.find("{")
    try:
        answer = json.loads(done.stdout[start:]) if start >= 0 else {}
    except ValueError:
        answer = {}
    if done.returncode or not answer.get("success"):
        said = str(answer.get("error-message") or done.stderr or done.stdout)
        raise RoloraError(f"flwr {' '.join(arguments[:2])}: {' '.join(said.split())[-300:]}")
    return dict(answer)
