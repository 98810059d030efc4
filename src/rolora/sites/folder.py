"""A federation's folder at the coordinator: keys, the SuperLink's database and logs."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import AfterValidator, StringConstraints, TypeAdapter, ValidationError

from rolora.config.load import read_toml
from rolora.config.schema import RunConfig
from rolora.errors import ConfigError, RoloraError
from rolora.files import from_home, is_locked, new_folder, write_file
from rolora.sites import keys
from rolora.sites.flower_internals import credentials
from rolora.sites.site_config import site_name

SITE = """\
# What this site contributes to every run. Check it with: rolora site --config site.toml --check
name = "{name}"
data = "rows.csv"          # this site's rows: csv, jsonl, parquet or a datasets folder
# A run may read no column until you give it a role; the coordinator gets the distinct labels.
# text = "text"            # a run may read this column as text
# label = "label"          # and this one as label
# labels = ["good", "bad"] # the only labels that may leave; default: any, 100 at most
# tasks = ["classification"]
# model = "models/base"    # where the base model is here; default: as in the run's configuration
# device = "cuda"
superlink = "{host}:{port}"
certificates = "ca.crt"
key = "{name}.key"
"""


# nodes.json: site name -> node id
_NODES = TypeAdapter(
    dict[
        Annotated[str, AfterValidator(site_name)],
        Annotated[str, StringConstraints(pattern=r"^[0-9]{1,20}$")],
    ]
)


@dataclass(frozen=True)
class FederationFolder:
    """What ``rolora federation keys`` makes. Each ``sites/NAME`` is for that site, all else for the
    coordinator only."""

    path: Path
    host: str
    port: int

    @classmethod
    def open(cls, path: Path) -> FederationFolder:
        """The folder at ``path``. ConfigError if it is not a federation's."""
        file = path / "federation.toml"
        if not file.is_file():
            raise ConfigError(
                f"{path} is not a federation folder: federation.toml is missing; make one with "
                f"rolora federation keys --folder {path} --host HOST --sites NAME,NAME"
            )
        values = read_toml(file)
        host, port = values.get("host"), values.get("port")
        if not isinstance(host, str) or type(port) is not int:
            raise ConfigError(f"{file} is damaged: it needs host and port")
        return cls(path.resolve(), host, port)

    @classmethod
    def create(cls, path: Path, host: str, port: int) -> FederationFolder:
        """A new folder with a CA and a certificate for ``host``. ConfigError if it exists."""
        if path.exists():
            raise ConfigError(f"{path} exists and is never overwritten")
        if not 0 < port < 65535:
            raise ConfigError(f"port {port} is not between 1 and 65534: control uses the next port")
        path.parent.mkdir(parents=True, exist_ok=True)
        control, secret = f"127.0.0.1:{port + 1}", secrets.token_hex(32).encode()
        here = {"address": control, "root-certificates": str(path.resolve() / "ca.crt")}
        settings = {"superlink": {"default": "rolora", "rolora": here}}
        with new_folder(path) as part:
            part.chmod(0o700)
            keys.make_authority(part, "rolora federation")
            keys.make_server(part, host)
            (part / "sites").mkdir()
            (part / "public").mkdir()
            (part / "flwr").mkdir()
            write_file(part / "control.secret", secret, keys.OWNER)
            write_file(part / "flwr" / "credentials.yaml", credentials(control, secret), keys.OWNER)
            write_file(part / "flwr" / "config.toml", tomli_w.dumps(settings))
            write_file(part / "federation.toml", tomli_w.dumps({"host": host, "port": port}))
        return cls(path.resolve(), host, port)

    @property
    def control(self) -> int:
        """The port, on this machine only, on which runs are started and keys registered."""
        return self.port + 1

    @property
    def lock(self) -> Path:
        """Held by the process that serves this federation."""
        return self.path / "serve.lock"

    @property
    def public(self) -> dict[str, Path]:
        """Site name -> its public key."""
        return {file.stem: file for file in sorted((self.path / "public").glob("*.pub"))}

    def add_site(self, name: str) -> Path:
        """Make keys for one more site; the folder to give to it. ConfigError if it has keys."""
        try:
            site_name(name)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        public, site = self.path / "public" / f"{name}.pub", self.path / "sites" / name
        if public.exists():  # which is written last: a site's folder alone was never given away
            raise ConfigError(f"site {name!r} has a key already: {public}")
        with new_folder(site, replace=True) as part:
            keys.make_site(part, name)
            shutil.copy(self.path / "ca.crt", part / "ca.crt")
            text = SITE.format(name=name, host=self.host, port=self.port)
            write_file(part / "site.toml", text)
        write_file(public, (site / f"{name}.pub").read_bytes())
        return site

    def remove_site(self, name: str) -> None:
        """Have the running SuperLink refuse this site's key from now on.

        Its folder goes too, so that the name can be used again. ConfigError if it has no key.
        """
        public = self.path / "public" / f"{name}.pub"
        if not public.exists():
            listed = ", ".join(self.public) or "none"
            raise ConfigError(f"there is no site {name!r}; the sites are: {listed}")
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
                f"{self.path} is not being served: start it with "
                f"rolora federation serve --folder {self.path}"
            )

    @property
    def environment(self) -> dict[str, str]:
        """For Flower's programs: no installation at run time, no telemetry, no update check."""
        return {
            **own_programs_first(),
            "FLWR_HOME": str(self.path / "flwr"),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def superlink(self) -> list[str]:
        """The command that serves the SuperLink; its state is in ``state.db``."""
        interface = "127.0.0.1" if keys.is_loopback(self.host) else "0.0.0.0"
        module = [sys.executable, "-m", "rolora.sites.superlink"]
        return [*module, str(self.path), interface, str(self.port)]

    def superexec(self) -> list[str]:
        """The command that starts the coordinator's app of each run."""
        return [
            *(sys.executable, "-m", "rolora.sites.superexec"),
            *("--runtime-api-address", f"127.0.0.1:{self.control}"),
            *("--root-certificates", str(self.path / "ca.crt")),
            *("--superexec-auth-secret-file", str(self.path / "control.secret")),
            *("--parent-pid", str(os.getpid())),
        ]

    def register(self, notify: Callable[[str], None]) -> bool:
        """Register the public keys that the running SuperLink does not know; whether all could be.

        ``notify`` receives a line for each. A key that is refused does not stop the others.
        """
        known, complete = self._known(), True
        for name, public in self.public.items():
            if name in known:
                continue
            register = ("supernode", "register", str(public), "rolora", "--name", name)
            try:
                known[name] = str(flwr(register, self.environment)["node-id"])
            except RoloraError as error:
                notify(f"cannot register the key of site {name} ({public}): {error}")
                complete = False
                continue
            write_file(self.path / "nodes.json", json.dumps(known))
            notify(f"registered the key of site {name}")
        return complete

    def status(self) -> dict[str, str]:
        """Site name -> its status at the running SuperLink: online, offline, registered."""
        listed = flwr(("supernode", "list", "rolora"), self.environment)["nodes"]
        status = {node["node-id"]: str(node["status"]) for node in listed}
        return {name: status.get(id, "unknown") for name, id in self._known().items()}

    def names(self) -> dict[int, str]:
        """The site's name for each node, by the key that was registered for it."""
        return {int(node): name for name, node in self._known().items()}

    def _known(self) -> dict[str, str]:
        """Site name -> node id, of the sites in the SuperLink's database.

        ConfigError if the file is damaged: without it a key could take another's name.
        """
        file = self.path / "nodes.json"
        if not file.exists() or not (self.path / "state.db").exists():
            return {}
        try:
            return _NODES.validate_json(file.read_bytes(), strict=True)
        except ValidationError:
            raise ConfigError(
                f"{file} is damaged: restore it, or remove it together with state.db, and every "
                "key is registered again"
            ) from None


def folder_of(config: RunConfig) -> FederationFolder | None:
    """The federation's folder that the run names; None if it names a SuperLink known to Flower."""
    path = config.root / from_home(config.federation.on or "")
    if config.federation.on is None or not path.is_dir():
        return None
    return FederationFolder.open(path)


def own_programs_first() -> dict[str, str]:
    """This process's environment, in which Python's own folder of programs is searched first."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": programs}


def flwr(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """The JSON answer of Flower's command line. RoloraError, one line, if it fails."""
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
        fault = str(answer.get("error-message") or done.stderr or done.stdout)
        raise RoloraError(f"flwr {' '.join(arguments[:2])}: {' '.join(fault.split())[-300:]}")
    return dict(answer)
