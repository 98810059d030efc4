"""The second engine: the cohort trains at its sites, and what they answer is not believed.

``Remote`` asks the questions of ``rolora.flower.site`` through a ``Carrier``, which is Flower in
earnest and a few function calls in tests. It sends a site what the run's ledger says it lacks; a
site that finds another adapter than the one meant says so and gets all of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rolora.adapter import AdapterState, ClientInfo, Failure, Update
from rolora.base import Base
from rolora.config import config_hash
from rolora.engine import ClientMetrics, Job
from rolora.errors import NoQuorum
from rolora.flower.parcel import PROTOCOL, Parcel, ParcelError, digest
from rolora.flower.site import layout, tokenizer_digest
from rolora.flower.site_config import NAME
from rolora.method import Method, ServerState
from rolora.schema import RunConfig
from rolora.traffic import lacking
from rolora.wire import WireError, decode, encode, num_bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lost:
    """A question that got no answer, and why."""

    reason: str


class Carrier(Protocol):
    """Brings questions to nodes and answers back."""

    def nodes(self) -> Sequence[int]:
        """The nodes that can be reached now."""
        ...

    def ask(
        self, questions: Mapping[int, Parcel], seconds: float
    ) -> Iterator[tuple[int, Parcel | Lost]]:
        """Each node's answer as it comes, once; ``Lost`` for those that have not in time."""
        ...


@dataclass(frozen=True)
class Member:
    """A site that takes part: its node, and how many rows it said it trains on."""

    node: int
    num_examples: int


@dataclass
class Roster:
    """Which sites there are, by name. The one thing of this engine that changes: sites come and go.

    A node says hello, then gets ready, then is a member; or it is refused, once and for all.
    """

    carrier: Carrier
    config: RunConfig
    run: str
    hellos: dict[int, Parcel] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def gather(self) -> list[Any]:
        """Wait until as many sites as ``federation.sites`` have said hello; all their labels.

        Raises NoQuorum if they have not within ``federation.wait`` seconds.
        """
        wanted, until = self.config.federation.sites, time.monotonic() + self.config.federation.wait
        self._greet()
        while len(self.hellos) < wanted:
            if time.monotonic() > until:
                why = "".join(f"; refused: {reason}" for reason in self.refused.values())
                raise NoQuorum(
                    f"{len(self.hellos)} of {wanted} sites (federation.sites) joined{why}; start "
                    "the others and resume"
                )
            time.sleep(1)
            self._greet()
        return sorted({label for hello in self.hellos.values() for label in _labels(hello)})

    def present(self, base: Base, labels: Sequence[Any]) -> Mapping[str, Member]:
        """The members that can be reached now; a node that was not here before may join."""
        nodes = self._greet()
        known = {member.node for member in self.members.values()}
        self._admit(nodes & self.hellos.keys() - known - self.refused.keys(), base, labels)
        return {name: m for name, m in sorted(self.members.items()) if m.node in nodes}

    def _greet(self) -> set[int]:
        """Say hello to nodes that are new; all nodes that are there."""
        nodes = set(self.carrier.nodes())
        values = self.config.model_dump_json(exclude_none=True).encode()
        new = nodes - self.hellos.keys() - self.refused.keys()
        questions = {node: self.question("hello", body=values) for node in new}
        for node, reply in self.carrier.ask(questions, self.config.federation.deadline):
            try:
                hello = checked(reply)
                if not NAME.fullmatch(hello.text("site")):
                    raise ParcelError(f"{hello.text('site')!r} is no name for a site")
                hello.whole("num_examples")
                _labels(hello)
                self.hellos[node] = hello
            except ParcelError as error:
                self._refuse(node, f"node {node}", str(error))
        return nodes

    def _admit(self, nodes: set[int], base: Base, labels: Sequence[Any]) -> None:
        """Have these nodes load what the run needs, and compare it with what is here."""
        questions = {n: self.question("ready", json.dumps(labels).encode()) for n in nodes}
        mine = {"base": base.digest, "tokenizer": tokenizer_digest(base), "layout": layout(base)}
        for node, reply in self.carrier.ask(questions, self.config.federation.deadline):
            hello = self.hellos[node]
            name = hello.text("site")
            try:
                ready = checked(reply)
                for key, value in mine.items():
                    if ready.text(key) != value:
                        theirs, own = ready.text(key)[:8], value[:8]
                        raise ParcelError(f"{_OTHER[key]} ({theirs}; the coordinator's is {own})")
                there = self.members.get(name)
                if there is not None and there.node in self.carrier.nodes():
                    raise ParcelError("another site of this name is here already")
                if strange := set(_labels(hello)) - set(labels):
                    raise ParcelError(f"label {min(map(str, strange))!r} is none of the run's")
                self.members[name] = Member(node, ready.whole("num_examples"))
                _log.info("site %s joined with %d rows", name, self.members[name].num_examples)
            except ParcelError as error:
                self._refuse(node, name, str(error))

    def _refuse(self, node: int, who: str, why: str) -> None:
        self.refused[node] = f"{who}: {why}"
        _log.warning("site %s is refused: %s", who, why)

    def question(self, ask: str, body: bytes = b"", **head: str | int | float | bool) -> Parcel:
        """A message of this run."""
        return Parcel({"ask": ask, "protocol": PROTOCOL, "run": self.run, **head}, body)


def _labels(hello: Parcel) -> list[Any]:
    try:
        found = json.loads(hello.text("labels"))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(x, str | int) for x in found):
        raise ParcelError("its labels are no list of texts or numbers")
    return found


_OTHER = {
    "base": "it has another base model",
    "tokenizer": "it has another tokenizer",
    "layout": "its model has other layers",
}


@dataclass(frozen=True)
class Remote:
    """Runs cohorts at their sites. ``base`` and ``labels`` are what sites are compared with."""

    roster: Roster
    config: RunConfig
    base: Base
    labels: tuple[Any, ...]

    def clients(self) -> Mapping[str, int]:
        """The sites that are there now."""
        return {name: member.num_examples for name, member in self._present().items()}

    def _present(self) -> Mapping[str, Member]:
        return self.roster.present(self.base, self.labels)

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        """Ask every site of the cohort to train; yield what comes back, checked, as it comes."""
        views = {info.id: method.download(job.server, info) for info in job.cohort}

        def train(info: ClientInfo, whole: bool) -> Parcel:
            held = job.ledger.held.get(info.id)
            has = None if whole else held
            return self._with_view(
                "train",
                views[info.id],
                lacking(method, job.server, views[info.id], job.ledger, has),
                round=job.round,
                num_examples=info.num_examples,
                seed=job.seed,
                lr=job.lr,
                last=held.last if held else 0,
            )

        for info, reply in self._asked(job.cohort, train):
            yield self._update(method, views[info.id], info, reply)

    def evaluate(
        self, method: Method, server: ServerState, clients: Sequence[ClientInfo]
    ) -> Iterator[ClientMetrics]:
        """Each site's metrics on its own held-out rows. No site has the server's test rows."""

        def score(info: ClientInfo, whole: bool) -> Parcel:
            view = method.download(server, info)
            return self._with_view("score", view, view, round=server.round)

        for info, reply in self._asked(clients, score):
            try:
                metrics = json.loads(checked(reply).text("metrics"))
                yield ClientMetrics(info.id, {str(k): float(v) for k, v in metrics.items()}, {})
            except (ParcelError, ValueError, TypeError, AttributeError) as error:
                _log.warning("site %s was not evaluated: %s", info.id, error)

    def _asked(
        self, cohort: Sequence[ClientInfo], question: Callable[[ClientInfo, bool], Parcel]
    ) -> Iterator[tuple[ClientInfo, Parcel | Lost]]:
        """Answers of a cohort; a site that lacks what it should hold is asked again with all."""
        until = time.monotonic() + self.config.federation.deadline
        present = self._present()
        left = {present[info.id].node: info for info in cohort if info.id in present}
        for info in cohort:
            if info.id not in present:
                yield info, Lost("it is no longer there")
        for whole in (False, True):
            again = {}
            questions = {node: question(info, whole) for node, info in left.items()}
            for node, reply in self.roster.carrier.ask(questions, until - time.monotonic()):
                if not whole and isinstance(reply, Parcel) and reply.head.get("lacks") is True:
                    again[node] = left[node]
                else:
                    yield left[node], reply
            left = again

    def _with_view(
        self, ask: str, view: AdapterState, missing: AdapterState, **head: str | int | float
    ) -> Parcel:
        payload, _ = encode("fp32", missing, missing, {})
        names = json.dumps(list(missing))
        return self.roster.question(ask, payload, view=digest(view), names=names, **head)

    def _update(
        self, method: Method, view: AdapterState, info: ClientInfo, reply: Parcel | Lost
    ) -> Update | Failure:
        up, like = self.config.wire.up, view.only(method.shared(info.round))
        try:
            found = checked(reply)
            if found.text("site") != info.id:
                raise ParcelError(f"it now calls itself {found.text('site')!r}")
            if found.whole("round") != info.round:
                raise ParcelError(f"it is of round {found.whole('round')}, not {info.round}")
            tensors = decode(up, found.body, like)
            metrics = {key: found.number(key) for key in ("loss", "steps")}
            count = found.whole("num_examples")
        except (ParcelError, WireError) as error:
            return Failure(info.id, str(error))
        adapter = AdapterState(tensors, view.scaling)
        encoded = None if up == "fp32" else num_bytes(up, like)
        return Update(info.id, adapter, count, metrics, encoded)


def checked(reply: Parcel | Lost) -> Parcel:
    """The answer. Raises ParcelError where there is none, or it says that the site failed."""
    if isinstance(reply, Lost):
        raise ParcelError(reply.reason)
    if "error" in reply.head:
        raise ParcelError(str(reply.head["error"])[:300])
    if reply.head.get("protocol") != PROTOCOL:
        raise ParcelError(f"it speaks protocol {reply.head.get('protocol')!r}, not {PROTOCOL}")
    if reply.head.get("lacks") is True:
        raise ParcelError("it could not put the adapter together from what it was sent")
    return reply


def run_id(config: RunConfig, folder: Path) -> str:
    """What sites call a run: a hash of what defines it and of where its folder is."""
    return hashlib.sha256(f"{config_hash(config)}{folder.resolve()}".encode()).hexdigest()[:16]


def replies_in_time(
    arriving: Iterable[tuple[int, Parcel | Lost]], asked: set[int], seconds: float
) -> Iterator[tuple[int, Parcel | Lost]]:
    """Those that came, each node once and only if it was asked; ``Lost`` for the others."""
    left = set(asked)
    for node, reply in arriving:
        if node in left:
            left.remove(node)
            yield node, reply
    for node in sorted(left):
        yield node, Lost(f"no answer within {seconds:.0f} s")
