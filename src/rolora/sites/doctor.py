"""What is wrong with a site's or a coordinator's setup: one line for each thing looked at."""

from __future__ import annotations

import datetime
import email.utils
import http.client
import json
import socket
import ssl
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rolora.config.schema import RunConfig
from rolora.data import tables
from rolora.errors import ConfigError, RoloraError
from rolora.files import is_locked
from rolora.flower.message import PROTOCOL, VERSIONS, Parcel, Plain, versions
from rolora.sites import keys
from rolora.sites.fleet import activate, fleet_client, leave, node_keys
from rolora.sites.folder import FederationFolder
from rolora.sites.site import Site
from rolora.sites.site_config import SiteConfig
from rolora.sites.site_run import table_here
from rolora.training.memory import free_bytes, phases, plan_bank

SKEW = 240  # seconds: Flower accepts a signature for 300
SOON = datetime.timedelta(days=30)
PATIENCE = 10.0  # seconds for a connection


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is as it should be, and what was found or is to be done."""

    what: str
    good: bool
    detail: str


def examine_site(site: SiteConfig, config: RunConfig | None) -> Iterator[Finding]:
    """Everything that a site needs to join; with a run's configuration also all that the run needs.

    Nothing is left behind and nothing leaves the site but a signed hello to the SuperLink.
    """
    yield Finding("versions", True, _versions())
    try:
        table = table_here(site)
        columns = ", ".join(table.column_names)
        yield Finding("rows", True, f"{table.num_rows:,} in {site.data}: {columns}")
        wanted = [*([site.text] if isinstance(site.text, str) else site.text or []), site.label]
        tables.require_columns(table, [name for name in wanted if name], site.data)
    except RoloraError as error:
        yield Finding("rows", False, str(error))
        return
    if config is not None:
        yield from _rehearse(site, config)
    yield from _connection(site)


def examine_federation(folder: FederationFolder) -> Iterator[Finding]:
    """Everything that a coordinator needs."""
    yield Finding("versions", True, _versions())
    try:
        for name in ("ca.crt", "server.crt"):
            yield _dates(folder.path / name)
        yield Finding("port", *_serves(folder))
        for name, status in folder.status().items():
            seen = "has never connected" if status == "registered" else status
            yield Finding(f"site {name}", status == "online", seen)
        unknown = set(folder.public) - set(folder.status())
        for name in sorted(unknown):
            yield Finding(f"site {name}", False, "its key is not registered yet")
    except RoloraError as error:
        yield Finding("SuperLink", False, f"{error} (start it with: rolora federation serve)")


def _versions() -> str:
    return ", ".join(f"{name} {value}" for name, value in versions().items())


def _serves(folder: FederationFolder) -> tuple[bool, str]:
    try:
        folder.require_served()
    except ConfigError as error:
        return False, str(error)
    return True, f"served; sites connect to {folder.host}:{folder.port}"


def _rehearse(site: SiteConfig, config: RunConfig) -> Iterator[Finding]:
    """Answer the first two questions of a run in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as scratch:
        trial = Site(site.model_copy(update={"state": scratch}))
        head: dict[str, Plain] = {"protocol": PROTOCOL, "run": "00000000"}
        body = config.model_dump_json(exclude_none=True).encode()
        hello = trial.answer(Parcel({**head, "ask": "hello"}, body))
        if "error" in hello.head:
            yield Finding("run", False, hello.text("error"))
            return
        labels = json.loads(hello.text("labels"))
        yield Finding("labels", True, ", ".join(map(str, labels)) or "none: the task has no labels")
        ready = trial.answer(Parcel({**head, "ask": "ready"}, hello.text("labels").encode()))
        if "error" in ready.head:
            yield Finding("model", False, ready.text("error"))
            return
        found = f"base {ready.text('base')[:12]}, tokenizer {ready.text('tokenizer')[:12]}"
        agreed = site.base is None or ready.text("base").startswith(site.base)
        yield Finding("model", agreed, found if agreed else f"{found}; expected base {site.base}")
        yield _memory(trial)


def _memory(trial: Site) -> Finding:
    run = trial.opened
    assert run is not None
    parts, engine = run.experiment, run.engine
    base, start = parts.base, parts.start.server.adapter
    kinds = phases(parts.method, run.config.train.rounds)
    size = run.config.train.batch_size
    plan = plan_bank(base, engine.task, engine.examples, start, kinds, size, 1)
    need, free = max(plan.activations.values()), free_bytes(base.device.type)
    said = f"a step keeps {need / 1e6:,.0f} MB beside the model; {free / 1e6:,.0f} MB are free"
    return Finding("memory", need < free, said)


def _connection(site: SiteConfig) -> Iterator[Finding]:
    try:
        if site.key is not None:
            path = site.root / Path(site.key).expanduser()
            keys.read_private_key(path)
            open_to_others = stat.S_IMODE(path.stat().st_mode) & 0o077
            yield Finding(
                "key",
                not open_to_others,
                f"others can read {path}: chmod 600" if open_to_others else site.key,
            )
        if site.certificates is not None:
            yield _dates(site.root / Path(site.certificates).expanduser())
        answered = list(_reach(site))
        yield from answered
        if not answered[0].good:
            return
        lock = site.folder / ".lock"
        if lock.exists() and is_locked(lock):
            yield Finding("accepted", True, "the site is running and connected now")
            return
        key, public = node_keys(site)
        with fleet_client(site, key) as client:
            node = activate(client, public, register=site.key is None)
            leave(client, node)
        yield Finding("accepted", True, f"the SuperLink knows this site as node {node}")
    except RoloraError as error:
        yield Finding("connection", False, str(error))


def _reach(site: SiteConfig) -> Iterator[Finding]:
    """Name, port, certificate, clock and versions; the first finding is good if it answers."""
    host, _, port = site.superlink.rpartition(":")
    try:
        if site.certificates is None:
            connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
        else:
            trusted = str(site.root / Path(site.certificates).expanduser())
            context = ssl.create_default_context(cafile=trusted)
            connection = http.client.HTTPSConnection(
                host, int(port), timeout=PATIENCE, context=context
            )
        connection.request("GET", VERSIONS)
        answer = connection.getresponse()
        date, body = answer.headers.get("date"), answer.read(10_000)
        connection.close()
    except socket.gaierror:
        why = f"no machine is called {host!r}: is superlink right in site.toml?"
    except ssl.SSLCertVerificationError as error:
        why = _certificate_fault(error, host)
    except ValueError:  # after the error of certificates, which is one too
        why = f"superlink = {site.superlink!r} is not of the form host:port"
    except ssl.SSLError as error:
        why = f"no TLS at {site.superlink} ({error.reason}): does the coordinator use it?"
    except ConnectionRefusedError:
        why = f"nothing listens at {site.superlink}: is rolora federation serve running there?"
    except TimeoutError:
        why = f"{site.superlink} does not answer within {PATIENCE:.0f} s: is a firewall in between?"
    except (OSError, http.client.HTTPException) as error:
        why = f"{site.superlink}: {error} (is it TLS there, and certificates missing here?)"
    else:
        yield _clock(site, date)
        yield _agreement(body if answer.status == 200 else b"")
        return
    yield Finding("superlink", False, why)


def _agreement(body: bytes) -> Finding:
    """The coordinator's versions beside these. Only the protocol must be the same."""
    try:
        theirs = dict(json.loads(body))
    except (ValueError, TypeError):
        return Finding("coordinator", True, "does not say its versions: no rolora federation serve")
    other = [
        f"{name} {theirs.get(name)} there, {value} here"
        for name, value in versions().items()
        if theirs.get(name) != value
    ]
    same_protocol = theirs.get("protocol") == PROTOCOL
    if not other:
        return Finding("coordinator", True, "has the same versions")
    fault = "" if same_protocol else "install the same rolora at both: "
    return Finding("coordinator", same_protocol, fault + "; ".join(other))


def _clock(site: SiteConfig, date: str | None) -> Finding:
    theirs = email.utils.parsedate_to_datetime(date) if date else None
    if theirs is None:
        return Finding("superlink", True, f"{site.superlink} answers")
    skew = (datetime.datetime.now(datetime.UTC) - theirs).total_seconds()
    if abs(skew) > SKEW:
        ahead = "ahead of" if skew > 0 else "behind"
        why = f"this clock is {abs(skew):.0f} s {ahead} the SuperLink's: set both by NTP"
        return Finding("superlink", False, why)
    return Finding(
        "superlink", True, f"{site.superlink} answers, clocks agree to {abs(skew):.0f} s"
    )


def _certificate_fault(error: ssl.SSLCertVerificationError, host: str) -> str:
    said = error.verify_message
    if "mismatch" in said.lower() or "doesn't match" in said:
        return f"the server's certificate is not for {host!r}: make it with --host {host}"
    if "expired" in said or "not yet valid" in said:
        return f"{said}: renew it, or is the clock wrong?"
    return f"the server's certificate is signed by another CA than certificates names ({said})"


def _dates(path: Path) -> Finding:
    certificate, now = keys.read_certificate(path), datetime.datetime.now(datetime.UTC)
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not since <= now <= until:
        detail = (
            f"valid from {since:%Y-%m-%d} to {until:%Y-%m-%d}: renew it, or is the clock wrong?"
        )
        return Finding(path.name, False, detail)
    left = until - now
    return Finding(path.name, left > SOON, f"valid until {until:%Y-%m-%d} ({left.days} days)")
