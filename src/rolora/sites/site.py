"""A site's part of a run: it answers four questions, and keeps its rows and state on its disk.

``Site.answer`` maps a question to an answer. What a site has received and sent is in its state
folder, one file per round, so a new process can answer the next question, or the same one again.
Rows, tokens and personal tensors never leave the site; ``outgoing.log`` lists what did.

====== ====================================== ==========================================
asks   the coordinator sends                  the site answers
====== ====================================== ==========================================
hello  the run's configuration                how many rows, which labels, versions
ready  the labels of all sites                hashes of base model, tokenizer, tensors
train  tensors that the site lacks            the tensors that it trained
score  tensors that the site lacks            metrics on its own held-out rows
====== ====================================== ==========================================
"""

from __future__ import annotations

import gc
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora.algorithm.adapter import AdapterState, Assignment, ClientInfo, Failure
from rolora.algorithm.codec import WireError, decode
from rolora.algorithm.method import ServerState
from rolora.data import tables
from rolora.errors import RoloraError
from rolora.files import write_file
from rolora.flower.message import PROTOCOL, MessageError, SiteMessage, digest, expand_names
from rolora.model.base import layout, tokenizer_digest
from rolora.sites.site_config import SiteConfig
from rolora.sites.site_run import SiteRun, config_here, split_here, table_here
from rolora.tasks.classification import in_order
from rolora.tasks.registry import task_kind
from rolora.training.client_store import ClientStore
from rolora.training.engine import Job, encoded

_log = logging.getLogger(__name__)
RUN = re.compile(r"[0-9a-f]{8,64}")


@dataclass
class Site:
    """A site that answers questions. The last run it was asked about stays loaded."""

    config: SiteConfig
    opened: SiteRun | None = None

    def answer(self, request: SiteMessage) -> SiteMessage:
        """The answer to a question. A failure is an answer too, with "error" in its head."""
        questions = {"hello": _hello, "ready": _ready, "train": _train, "score": _score}
        asked = str(request.head.get("ask"))
        try:
            if request.integer("protocol") != PROTOCOL:
                raise MessageError(
                    f"the coordinator speaks protocol {request.head['protocol']}, this site "
                    f"{PROTOCOL}: install the same version of rolora at both"
                )
            run = request.text("run")
            if asked not in questions or not RUN.fullmatch(run):
                raise MessageError(f"unknown question {asked!r} for run {run!r}")
            if self.config.threads is not None:
                torch.set_num_threads(self.config.threads)
            reply = questions[asked](self, self.config.folder / run, request)
        except (RoloraError, OSError) as error:
            reply = SiteMessage({"error": str(error)})
        except Exception as error:  # a library's message may quote rows: it is not sent
            _log.exception("%s could not be answered", asked)
            reply = SiteMessage({"error": f"{type(error).__name__}; see the site's log"})
        head = {"site": self.config.name, "protocol": PROTOCOL, **reply.head}
        reply = replace(reply, head=head)
        _note_outgoing(self.config, asked, request, reply)
        return reply

    def open(self, folder: Path) -> SiteRun:
        """The run with this folder. Loading it releases the one before."""
        config = config_here(self.config, folder)
        try:
            labels = tuple(json.loads((folder / "labels.json").read_text()))
        except FileNotFoundError:
            raise MessageError("this site does not know the labels of the run yet") from None
        run = SiteRun(self.config, config, labels, ClientStore(folder))
        if self.opened != run:
            if self.opened is not None:
                self.opened = None
                gc.collect()  # its weights are in reference cycles, and would stay mapped
            self.opened = run
        return self.opened


def _hello(site: Site, folder: Path, request: SiteMessage) -> SiteMessage:
    """Store the run's configuration; answer the number of rows and their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "config.json", request.body)
    own = site.config
    config = config_here(own, folder)
    table = table_here(own)
    labels = []
    if task_kind(config.model.task).labelled:
        labels = in_order(tables.labels(table, config.data.label, own.data))
    rows, _ = split_here(config, own, table.num_rows)
    return SiteMessage(
        {
            "num_examples": len(rows),
            "labels": json.dumps(labels),
            "rolora": version("rolora"),
            "torch": version("torch"),
        }
    )


def _ready(site: Site, folder: Path, request: SiteMessage) -> SiteMessage:
    """Load the model and the rows, so that faults show now; answer the model's hashes."""
    write_file(folder / "labels.json", request.body)
    run = site.open(folder)
    engine = run.engine
    return SiteMessage(
        {
            "base": run.experiment.base.digest,
            "tokenizer": tokenizer_digest(run.experiment.base),
            "layout": layout(run.experiment.base),
            "num_examples": len(engine.shards[run.site.name]),
        }
    )


def _train(site: Site, folder: Path, request: SiteMessage) -> SiteMessage:
    """One round of local training."""
    run, name = site.open(folder), site.config.name
    round = request.integer("round")
    if round < 1:
        raise MessageError("'round' is 0, expected at least 1")
    for kind in ("round", "residual"):
        replace(run.store, kind=kind).forget(name, after=request.integer("last"))
    received = _received(run, request, round)
    if received is None:
        return SiteMessage({"lacks": True})
    method = run.method
    info = ClientInfo(name, request.integer("num_examples"), request.integer("rank"), round)
    held = len(run.engine.shards[name])
    if info.num_examples != held:
        raise MessageError(
            f"the coordinator expects {info.num_examples} rows, but there are {held}"
        )
    assigned = Assignment(info, received)
    server = ServerState(received, round=round - 1)
    job = Job(server, (assigned,), request.integer("seed"), request.number("lr"))
    (update,) = run.engine.run(method, job)
    if isinstance(update, Failure):
        raise MessageError(update.reason)
    payload, sent = encoded(run.config.wire.up, method, assigned, update.adapter, run.store)
    replace(run.store, kind="sent").write(name, round, sent)
    metrics = {"round": round, "num_examples": held, **update.metrics}
    return SiteMessage(metrics, payload, tuple(sent))


def _score(site: Site, folder: Path, request: SiteMessage) -> SiteMessage:
    """Metrics of this site's adapter on its held-out rows; {} if there are none."""
    run, name = site.open(folder), site.config.name
    round = request.integer("round")  # the rounds that are done
    received = _received(run, request, round + 1)
    if received is None:
        return SiteMessage({"lacks": True})
    info = ClientInfo(name, len(run.engine.shards[name]), request.integer("rank"), round)
    (found,) = run.engine.evaluate(run.method, [Assignment(info, received)])
    return SiteMessage({"round": round, "metrics": json.dumps(dict(found.held_out))})


def _received(run: SiteRun, request: SiteMessage, round: int) -> AdapterState | None:
    """The adapter to start this round from: what is stored here, overlaid with what was sent.

    None if its hash is not the one that the coordinator sent.
    """
    like = run.view_of_rank(request.integer("rank"))
    names = expand_names(request.text("names"), like)
    try:
        came = decode("fp32", request.body, {name: like[name] for name in names})
    except WireError as error:
        raise MessageError(str(error)) from None
    wanted, name = request.text("view"), run.site.name
    store = replace(run.store, kind="received")
    before = store.read(name, before=round + 1)
    own = replace(run.store, kind="sent").read(name, before=round)
    for held in (before, before | own):
        view: dict[str, Tensor] = {**held, **came}
        if view.keys() == like.keys() and digest(view) == wanted:
            store.write(name, round, view)
            return AdapterState(view, run.experiment.base.specs.scaling)
    return None


def _note_outgoing(site: SiteConfig, asked: str, request: SiteMessage, reply: SiteMessage) -> None:
    """Append to outgoing.log: the question, the values and tensors sent, the number of bytes."""
    entry: Mapping[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "asked": asked,
        "run": request.head.get("run"),
        "left": dict(reply.head),
        "tensors": reply.tensors,
        "bytes": len(reply.body),
    }
    site.folder.mkdir(parents=True, exist_ok=True)
    with (site.folder / "outgoing.log").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
