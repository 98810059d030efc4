"""A site's part of a run: it answers four questions, and its rows and state stay on its disk.

``Site.answer`` maps a question to an answer. What a site has received and sent is in its state
folder, one file per round, so a new process can answer the next question, or the same one again.
Rows, tokens and personal tensors never leave the site. Whatever leaves passes ``gate.leave`` and is
listed in ``outgoing.log``; ``policy`` enforces what the operator agreed to.

====== ====================================== ==========================================
asks   the coordinator sends                  the site answers
====== ====================================== ==========================================
hello  the run's configuration                how many rows, their labels, versions
ready  the labels of all sites                how many rows, hashes of the model
train  tensors that the site lacks            the tensors that it trained
score  tensors that the site lacks            metrics on its own held-out rows
====== ====================================== ==========================================
"""

from __future__ import annotations

import gc
import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rolora.algorithm import patches
from rolora.algorithm.adapter import AdapterState, Assignment, ClientInfo, Update
from rolora.algorithm.codec import WireError, decode
from rolora.algorithm.method import ServerState
from rolora.algorithm.seeding import generator
from rolora.config.load import make_config
from rolora.data import tables
from rolora.errors import ConfigError, DataError, printable
from rolora.files import make_folder, write_file
from rolora.flower.message import (
    MOST_CONFIG,
    MessageError,
    SiteMessage,
    bounded,
    digest,
    expand_names,
    read_json,
    read_labels,
)
from rolora.flower.versions import PROTOCOL, versions
from rolora.model.base import layout, tokenizer_digest
from rolora.run.experiment import Experiment
from rolora.run.refusals import require_turns
from rolora.run.shards import Rows, hold_out, neighboured
from rolora.sites.gate import leave
from rolora.sites.policy import (
    Refused,
    Uses,
    consented,
    require_bounded,
    require_labels,
    require_rows,
)
from rolora.sites.site_config import SiteConfig
from rolora.tasks.registry import task_kind
from rolora.training.client_store import ClientStore
from rolora.training.engine import InProcess, Job, encoded
from rolora.training.local import NonFiniteLoss

_log = logging.getLogger(__name__)
RUN = re.compile(r"[0-9a-f]{8,64}")


def experiment_here(site: SiteConfig, received: str | bytes, labels: str = "[]") -> Experiment:
    """A run's parts, with this site's rows and paths, and the columns its operator agreed to.

    ``received`` is the run's configuration, and ``labels`` the list of all sites' labels, as JSON.
    Raises Refused for what the operator has not agreed to.
    """
    values = read_json(received, MOST_CONFIG)
    if not isinstance(values, dict):
        raise MessageError("the run's configuration is not a table")
    config = consented(site, make_config(values, root=site.root))
    own: dict[str, dict[str, Any]] = {
        "data": {"train": site.data},
        "model": {"path": site.model, "device_map": None if site.device == "cuda" else "none"},
        "train": {"cache": str((site.folder / "cache").resolve()) if config.train.cache else ""},
    }
    changed: dict[str, Any] = {"device": site.device}
    for section, keys in own.items():
        given = {key: value for key, value in keys.items() if value is not None}
        changed[section] = getattr(config, section).model_copy(update=given)
    config = config.model_copy(update=changed)
    table = tables.read_table(site.data, root=site.root, form=site.form)
    kind = task_kind(config.model.task)
    columns = kind.columns_read(dict(config.data))
    if kind.compares and config.lora.init_from is not None:
        raise ConfigError("the run starts from an adapter that this site does not have")
    tables.require_columns(table, columns, site.data)
    share = config.data.client_test or 0
    rows, kept = hold_out(torch.arange(table.num_rows), share, config.seed, site.name)
    require_rows(site, config, len(rows), len(kept))
    require_bounded(site, config, len(rows))
    held_out = {site.name: kept} if len(kept) else {}
    mine = Rows(table.select(columns), None, None, shards={site.name: rows}, held_out=held_out)
    return Experiment(
        config,
        rows=neighboured(mine, kind, kind.chosen(dict(config.data))),
        labels=tuple(read_labels(labels)),
    )


@dataclass(frozen=True)
class SiteRun:
    """One run at one site, loaded. ``made_of``: its folder, and the texts of the files there."""

    made_of: tuple[Path, str, str]
    experiment: Experiment
    engine: InProcess


@dataclass
class Site:
    """A site that answers questions. The last run it was asked about stays loaded."""

    config: SiteConfig
    opened: SiteRun | None = None

    def answer(self, request: SiteMessage) -> SiteMessage:
        """The answer to a question. A failure is an answer too, with "error" in its head."""
        asked, run = str(request.head.get("ask")), None
        try:
            request = bounded(request.head, request.body)
            if request.integer("protocol") != PROTOCOL:
                raise Refused(
                    "protocol",
                    f"the coordinator speaks protocol {request.head['protocol']}, this site "
                    f"{PROTOCOL}: install the same version of rolora at both",
                )
            name = request.text("run")
            if asked not in QUESTIONS or not RUN.fullmatch(name):
                raise MessageError("an unknown question, or a run without an id")
            run = name
            if self.config.threads is not None:
                torch.set_num_threads(self.config.threads)
            if asked != "hello":  # which is counted once it is known to be allowed
                round = request.integer("round") if "round" in request.head else 0
                Uses.read(self.config).count(run, round)
            reply = QUESTIONS[asked](self, self.config.folder / run, request)
        except Exception as error:  # its message may quote rows: it is not sent
            reply = _failed(asked, error)
        asked = asked if asked in QUESTIONS else "?"
        return leave(self.config, asked, run, reply)

    def open(self, folder: Path) -> SiteRun:
        """The run with this folder. Loading it releases the one before."""
        config = _stored(folder / "config.json", "has not received the run's configuration")
        labels = _stored(folder / "labels.json", "does not know the labels of the run yet")
        made_of = (folder, config, labels)
        if self.opened is None or self.opened.made_of != made_of:
            self.opened = None
            gc.collect()  # its weights are in reference cycles, and would stay mapped
            parts = experiment_here(self.config, config, labels)
            sizes = {client: len(rows) for client, rows in parts.rows.shards.items()}
            try:
                require_turns(parts.method, parts.config.train, sizes)
            except ConfigError as error:
                raise Refused("turns", str(error)) from None
            engine = InProcess(
                parts.base,
                parts.task,
                parts.examples,
                parts.shards,
                parts.settings,
                ClientStore(folder),
                bank_size=1,
                held_out=parts.held_out,
                up=None,
            )
            self.opened = SiteRun(made_of, parts, engine)
        return self.opened


def _failed(asked: str, error: Exception) -> SiteMessage:
    """The answer in place of one that failed: a code. The site's log has the rest."""
    kinds = {
        MessageError: "question",
        DataError: "data",
        ConfigError: "config",
        NonFiniteLoss: "diverged",
        WireError: "diverged",
        OSError: "disk",
    }
    code = next((code for kind, code in kinds.items() if isinstance(error, kind)), "failed")
    if isinstance(error, Refused):
        code = error.code
    if code == "failed":
        _log.exception("%s could not be answered", printable(asked[:20]))
        return SiteMessage({"error": code}, note=type(error).__name__)
    return SiteMessage({"error": code}, note=str(error))


def _stored(file: Path, without: str) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        raise MessageError(f"this site {without}") from None


def _hello(site: Site, folder: Path, request: SiteMessage) -> SiteMessage:
    """Store the run's configuration; answer the number of rows and their labels."""
    parts = experiment_here(site.config, request.body)
    labels = parts.kind.labels(parts.rows.train, parts.columns, site.config.data)
    require_labels(site.config, labels)
    Uses.read(site.config).admit(folder.name, parts.config, parts.rows.train.num_rows)
    make_folder(folder)
    write_file(folder / "config.json", request.body)
    count = len(parts.rows.shards[site.config.name])
    return SiteMessage({**versions(), "num_examples": count, "labels": json.dumps(labels)})


def _ready(site: Site, folder: Path, request: SiteMessage) -> SiteMessage:
    """Load the model and the rows, so that faults show now; answer the model's hashes."""
    read_labels(request.body)
    write_file(folder / "labels.json", request.body)
    engine = site.open(folder).engine
    return SiteMessage(
        {
            "base": engine.base.digest,
            "tokenizer": tokenizer_digest(engine.base),
            "layout": layout(engine.base),
            "num_examples": engine.clients()[site.config.name],
        }
    )


def _train(site: Site, folder: Path, request: SiteMessage) -> SiteMessage:
    """One round of local training."""
    run, name = site.open(folder), site.config.name
    method, engine, store = run.experiment.method, run.engine, run.engine.store
    round = request.integer("round")
    if round < 1:
        raise MessageError("'round' is 0, expected at least 1")
    for kind in ("round", "residual", "moments"):
        replace(store, kind=kind).forget(name, after=request.integer("last"))
    received = _received(run, name, request, round)
    if received is None:
        return SiteMessage({"lacks": True})
    held, expected = engine.clients()[name], request.integer("num_examples")
    if expected != held:
        raise Refused("count", f"the coordinator expects {expected} rows, but there are {held}")
    assigned = Assignment(ClientInfo(name, held, request.integer("rank"), round), received)
    server = ServerState(received, round=round - 1)
    job = Job(server, (assigned,), request.integer("seed"), request.number("lr"))
    (update,) = engine.run(method, job)
    assert isinstance(update, Update)  # an engine that encodes nothing gives no other
    up = run.experiment.config.wire.up
    payload, sent = encoded(up, method, assigned, update.adapter, store)
    replace(store, kind="sent").write(name, round, sent)
    metrics = {"round": round, "num_examples": held, **update.metrics}
    return SiteMessage(metrics, payload, tuple(sent))


def _score(site: Site, folder: Path, request: SiteMessage) -> SiteMessage:
    """Metrics of this site's adapter on its held-out rows; {} if there are none."""
    run, name = site.open(folder), site.config.name
    round = request.integer("round")  # the rounds that are done
    received = _received(run, name, request, round + 1)
    if received is None:
        return SiteMessage({"lacks": True})
    info = ClientInfo(name, run.engine.clients()[name], request.integer("rank"), round)
    (found,) = run.engine.evaluate(run.experiment.method, [Assignment(info, received)])
    return SiteMessage({"round": round, "metrics": json.dumps(dict(found.held_out))})


def _received(run: SiteRun, name: str, request: SiteMessage, round: int) -> AdapterState | None:
    """The adapter to start this round from: what is stored here, overlaid with what was sent.

    None if its hash is not the one that the coordinator sent.
    """
    method, specs = run.experiment.method, run.engine.base.specs
    start = ServerState(method.init(specs, generator(run.experiment.config.seed, "init")))
    # only for the names and shapes of what a client of this rank is sent
    like = method.download(start, ClientInfo(name, 0, request.integer("rank"), 1))
    travels = patches.layout(like, request.integer("growth"))
    names = expand_names(request.text("names"), travels)
    try:
        came = decode("fp32", request.body, {name: travels[name] for name in names})
    except WireError as error:
        raise MessageError(str(error)) from None
    store = replace(run.engine.store, kind="received")
    before = store.read(name, before=round + 1)
    own = replace(store, kind="sent").read(name, before=round)
    # what was sent for an evaluation has its patch already
    for held, old in ((before, before), (before | own, before), (before, {}), (before | own, {})):
        view = {**held, **patches.applied(old, came)}
        if view.keys() == like.keys() and digest(view) == request.text("view"):
            store.write(name, round, view)
            return AdapterState(view, specs.scaling)
    return None


QUESTIONS = {"hello": _hello, "ready": _ready, "train": _train, "score": _score}
