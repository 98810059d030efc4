"""What is wrong with the setup of a site or a coordinator: one finding for each thing checked."""

from __future__ import annotations

import datetime
import email.utils
import json
import socket
import ssl
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from rolora.data import tables
from rolora.errors import RoloraError
from rolora.files import is_locked
from rolora.flower.membership import checked
from rolora.flower.message import MessageError, Scalar, SiteMessage, read_json
from rolora.flower.versions import PROTOCOL, VERSIONS, versions
from rolora.sites import keys
from rolora.sites.flower_internals import Fleet
from rolora.sites.folder import FederationFolder
from rolora.sites.policy import Uses
from rolora.sites.site import Site
from rolora.sites.site_config import SiteConfig
from rolora.training.memory import free_bytes

SKEW = 240  # seconds: Flower accepts a signature for 300
SOON = datetime.timedelta(days=30)
TIMEOUT = 10.0  # seconds for a connection


@dataclass(frozen=True)
class Finding:
    """What was checked, whether it is good, and what was found or is to be done."""

    what: str
    good: bool
    detail: str


def examine_site(site: SiteConfig, run: str | None) -> Iterator[Finding]:
    """Check all that a site needs to join and, given a run's configuration (JSON), to take part.

    Nothing is left behind, and nothing leaves the site but a signed hello to the SuperLink.
    """
    yield _own_versions()
    yield from _limits(site)
    try:
        table = tables.read_table(site.data, root=site.root, form=site.form)
        columns = ", ".join(table.column_names)
        yield Finding("rows", True, f"{table.num_rows:,} in {site.data}: {columns}")
        for named in site.roles.values():
            tables.require_columns(table, named, site.data)
        yield _roles(site)
    except RoloraError as error:
        yield Finding("rows", False, str(error))
        return
    if run is not None:
        yield from _try_run(site, run)
    try:
        yield from _connection(site)
    except RoloraError as error:
        yield Finding("connection", False, str(error))


def examine_federation(folder: FederationFolder) -> Iterator[Finding]:
    """Check all that a coordinator needs."""
    yield _own_versions()
    try:
        for name in ("ca.crt", "server.crt"):
            yield _validity(folder.path / name)
        folder.require_served()
        yield Finding("port", True, f"served; sites connect to {folder.host}:{folder.port}")
        status = folder.status()
    except RoloraError as error:
        yield Finding("SuperLink", False, str(error))
        return
    for name, state in status.items():
        detail = "has never connected" if state == "registered" else state
        yield Finding(f"site {name}", state == "online", detail)
    for name in sorted(set(folder.public) - set(status)):
        yield Finding(f"site {name}", False, "its key is not registered yet")


def _own_versions() -> Finding:
    listed = ", ".join(f"{name} {value}" for name, value in versions().items())
    return Finding("versions", True, listed)


def _roles(site: SiteConfig) -> Finding:
    """What a run may read as what."""
    listed = "; ".join(f"{' and '.join(named)} as {role}" for role, named in site.roles.items())
    if listed:
        return Finding("roles", True, f"{listed}; for {', '.join(site.tasks)}")
    return Finding(
        "roles",
        False,
        'no run may read a column: give the columns roles, for example text = "text" and '
        'label = "label" in site.toml',
    )


def _limits(site: SiteConfig) -> Iterator[Finding]:
    """What the site's operator allows, and how much of it runs have used."""
    try:
        runs = Uses.read(site).runs
    except RoloraError as error:
        yield Finding("runs", False, str(error))
        return
    left = len(runs) < site.max_runs
    detail = f"{len(runs):,} of {site.max_runs:,} answered (max_runs)"
    yield Finding(
        "runs", left, detail if left else f"{detail}: a new run is refused until you raise it"
    )
    used, most = max(
        ((use.questions, f"run {run}, the most") for run, use in runs.items()),
        default=(0, "any run"),
    )
    yield Finding(
        "questions", True, f"{used:,} of {site.max_questions:,} answered in {most} (max_questions)"
    )
    sizes = ("max_rounds", "max_steps", "max_batch", "max_rank", "min_train_rows", "min_score_rows")
    yield Finding("sizes", True, ", ".join(f"{key} {getattr(site, key):,}" for key in sizes))


def _try_run(site: SiteConfig, run: str) -> Iterator[Finding]:
    """Answer the first two questions of a run, in a temporary state folder."""
    with tempfile.TemporaryDirectory() as scratch:
        trial = Site(site.model_copy(update={"state": scratch}))

        def answer(ask: str, body: str) -> SiteMessage:
            head: dict[str, Scalar] = {"ask": ask, "protocol": PROTOCOL, "run": "00000000"}
            reply = trial.answer(SiteMessage(head, body.encode()))
            if "error" in reply.head:
                raise RoloraError(reply.note)
            return checked(reply)

        part = "run"
        try:
            labels = answer("hello", run).text("labels")
            listed = ", ".join(json.loads(labels))
            yield Finding("labels", True, listed or "none: the task has no labels")
            part = "model"
            ready = answer("ready", labels)
        except RoloraError as error:
            yield Finding(part, False, str(error))
            return
        base = ready.text("base")
        detail = f"base {base[:12]}, tokenizer {ready.text('tokenizer')[:12]}"
        if site.base is None or base.startswith(site.base):
            yield Finding("model", True, detail)
        else:
            yield Finding("model", False, f"{detail}; expected base {site.base}")
        assert trial.opened is not None
        parts = trial.opened.experiment
        need, free = max(parts.bank_plan.activations.values()), free_bytes(parts.base.device.type)
        detail = f"{need / 1e6:,.0f} MB beside the model; {free / 1e6:,.0f} MB are free"
        yield Finding("memory", need < free, f"a step needs {detail}")


def _connection(site: SiteConfig) -> Iterator[Finding]:
    key, certificates = site.path(site.key), site.path(site.certificates)
    if key is not None:
        keys.read_private_key(key)
        private = not stat.S_IMODE(key.stat().st_mode) & 0o077
        yield Finding(
            "key", private, str(site.key) if private else f"others can read {key}: chmod 600"
        )
    if certificates is not None:
        yield _validity(certificates)
    try:
        answer = _get_versions(site.superlink, certificates)
    except RoloraError as error:
        yield Finding("superlink", False, str(error))
        return
    clock = _clock(site, answer.headers.get("date"))
    yield clock
    yield _other_versions(answer.content if answer.status_code == 200 else b"")
    if not clock.good:
        return
    lock = site.folder / ".lock"
    if lock.exists() and is_locked(lock):
        yield Finding("accepted", True, "the site is running and connected now")
        return
    with Fleet.join(site) as fleet:
        yield Finding("accepted", True, f"the SuperLink knows this site as node {fleet.id}")


def _get_versions(address: str, certificates: Path | None) -> httpx.Response:
    """The coordinator's answer when asked for its versions. RoloraError says why there is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise RoloraError(f"superlink = {address!r} is not of the form host:port")
    scheme = "http" if certificates is None else "https"
    verify = True if certificates is None else ssl.create_default_context(cafile=certificates)
    try:
        return httpx.get(f"{scheme}://{address}{VERSIONS}", verify=verify, timeout=TIMEOUT)
    except httpx.TransportError as error:
        raise RoloraError(_fault(error, host, address)) from None


def _fault(error: httpx.TransportError, host: str, address: str) -> str:
    """What keeps a site from reaching the coordinator, and what to do."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, socket.gaierror):
        return f"no machine is called {host!r}: is superlink right in site.toml?"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _certificate_fault(cause.verify_message, host)
    if isinstance(cause, ssl.SSLError):
        return f"no TLS at {address} ({cause.reason}): does the coordinator use it?"
    if isinstance(cause, ConnectionRefusedError):
        return f"nothing listens at {address}: is rolora federation serve running there?"
    if isinstance(error, httpx.TimeoutException):
        return f"{address} does not answer within {TIMEOUT:.0f} s: is a firewall in between?"
    return f"{address}: {error} (does the coordinator use TLS, and certificates is not set here?)"


def _certificate_fault(reason: str, host: str) -> str:
    if "mismatch" in reason.lower() or "doesn't match" in reason:
        return f"the server's certificate is not for {host!r}: make it with --host {host}"
    if "expired" in reason or "not yet valid" in reason:
        return f"{reason}: renew it, or is the clock wrong?"
    return f"the server's certificate is signed by another CA than certificates names ({reason})"


def _other_versions(body: bytes) -> Finding:
    """The coordinator's versions beside these. Only the protocol must be the same."""
    try:
        theirs = dict(read_json(body, 10_000))
    except (MessageError, ValueError, TypeError):
        return Finding(
            "coordinator", True, "does not report its versions: it is not rolora federation serve"
        )
    differences = "; ".join(
        f"{name} {theirs.get(name)} there, {value} here"
        for name, value in versions().items()
        if theirs.get(name) != value
    )
    if theirs.get("protocol") != PROTOCOL:
        return Finding(
            "coordinator", False, f"install the same version of rolora at both: {differences}"
        )
    return Finding("coordinator", True, differences or "has the same versions")


def _clock(site: SiteConfig, date: str | None) -> Finding:
    if date is None:
        return Finding("superlink", True, f"{site.superlink} answers")
    theirs = email.utils.parsedate_to_datetime(date)
    skew = (datetime.datetime.now(datetime.UTC) - theirs).total_seconds()
    if abs(skew) > SKEW:
        ahead = "ahead of" if skew > 0 else "behind"
        detail = f"this clock is {abs(skew):.0f} s {ahead} the SuperLink's: set both by NTP"
        return Finding("superlink", False, detail)
    detail = f"{site.superlink} answers, clocks agree to {abs(skew):.0f} s"
    return Finding("superlink", True, detail)


def _validity(path: Path) -> Finding:
    """Whether a certificate is valid now, and for a while."""
    certificate, now = keys.read_certificate(path), datetime.datetime.now(datetime.UTC)
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not since <= now <= until:
        valid = f"valid from {since:%Y-%m-%d} to {until:%Y-%m-%d}"
        return Finding(path.name, False, f"{valid}: renew it, or is the clock wrong?")
    left = until - now
    return Finding(path.name, left > SOON, f"valid until {until:%Y-%m-%d} ({left.days} days)")
