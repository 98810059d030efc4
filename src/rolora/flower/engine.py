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
from typing import Any, Protocol

from rolora.adapter import AdapterState, ClientInfo, Failure, Update
from rolora.base import Base
from rolora.engine import ClientMetrics, Job
from rolora.errors import ConfigError, NoQuorum
from rolora.flower.parcel import PROTOCOL, Parcel, ParcelError, digest
from rolora.flower.site import NAME, layout, tokenizer_digest
from rolora.method import Method, ServerState
from rolora.schema import RunConfig
from rolora.traffic import lacking
from rolora.wire import WireError, decode, encode, num_bytes

_log = logging.getLogger(__name__)
LARGEST_BODY_TO_SPARE = 4096  # bytes of a payload's header, at most


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

    ``labels`` are those of the sites that were there at the start. ``refused``: node -> why.
    """

    carrier: Carrier
    config: RunConfig
    run: str
    members: dict[str, Member] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    labels: tuple[Any, ...] | None = None
    base: Base | None = None

    def gather(self) -> tuple[Any, ...]:
        """Wait until as many sites as the configuration asks for have joined; all their labels.

        Raises NoQuorum if they have not within ``federation.wait`` seconds.
        """
        wanted, until = self.config.federation.sites, time.monotonic() + self.config.federation.wait
        said = hellos = dict[int, Parcel]()
        while len(hellos) < wanted:
            hellos |= self._hello(set(self.carrier.nodes()) - hellos.keys() - self.refused.keys())
            if len(hellos) < wanted:
                if time.monotonic() > until:
                    raise NoQuorum(self._few(len(hellos), wanted))
                time.sleep(1)
        known = {label: None for hello in said.values() for label in json.loads(hello.text("labels"))}
        self.labels = tuple(sorted(known))
        return self.labels

    def present(self) -> Mapping[str, Member]:
        """The sites that can be reached now; one that was not here before is asked to join."""
        nodes = set(self.carrier.nodes())
        new = nodes - {member.node for member in self.members.values()} - self.refused.keys()
        if new:
            self._join(self._hello(new))
        return {name: m for name, m in sorted(self.members.items()) if m.node in nodes}

    def _hello(self, nodes: set[int]) -> dict[int, Parcel]:
        """Answers of nodes that understood; the others are refused and named in the log."""
        values = self.config.model_dump_json(exclude_none=True).encode()
        found = {}
        questions = {node: self.question("hello", body=values) for node in nodes}
        for node, reply in self.carrier.ask(questions, self.config.federation.deadline):
            try:
                checked(reply)
                name = reply.text("site")  # type: ignore[union-attr]
                if not NAME.fullmatch(name):
                    raise ParcelError(f"{name!r} is no name for a site")
                assert isinstance(reply, Parcel)
                reply.whole("num_examples")
                found[node] = reply
            except ParcelError as error:
                self.refuse(node, f"node {node}", str(error))
        return found

    def _join(self, hellos: Mapping[int, Parcel]) -> None:
        assert self.base is not None and self.labels is not None
        body = json.dumps(self.labels).encode()
        questions = {node: self.question("ready", body=body) for node in hellos}
        mine = {
            "base": self.base.digest,
            "tokenizer": tokenizer_digest(self.base),
            "layout": layout(self.base),
        }
        for node, reply in self.carrier.ask(questions, self.config.federation.deadline):
            name = hellos[node].text("site")
            try:
                checked(reply)
                assert isinstance(reply, Parcel)
                for key, value in mine.items():
                    if reply.text(key) != value:
                        raise ParcelError(f"{_OTHER[key]} ({reply.text(key)[:8]}, here {value[:8]})")
                there = self.members.get(name)
                if there is not None and there.node in self.carrier.nodes():
                    raise ParcelError("another site of this name is here already")
                strange = set(json.loads(hellos[node].text("labels"))) - set(self.labels)
                if strange:
                    raise ParcelError(f"label {min(map(str, strange))!r} is none of the run's")
            except ParcelError as error:
                self.refuse(node, name, str(error))
                continue
            self.members[name] = Member(node, reply.whole("num_examples"))
            _log.info("site %s joined with %d rows", name, self.members[name].num_examples)

    def refuse(self, node: int, who: str, why: str) -> None:
        """Never ask this node again in this process."""
        self.refused[node] = why
        _log.warning("site %s is refused: %s", who, why)

    def question(self, ask: str, body: bytes = b"", **head: str | int | float | bool) -> Parcel:
        """A message of this run."""
        return Parcel({"ask": ask, "protocol": PROTOCOL, "run": self.run, **head}, body)

    def _few(self, found: int, wanted: int) -> str:
        why = "".join(f"; refused: {reason}" for reason in self.refused.values())
        return f"{found} of {wanted} sites (federation.sites) joined{why}; start the others and resume"


_OTHER = {
    "base": "it has another base model",
    "tokenizer": "it has another tokenizer",
    "layout": "its model has other layers",
}


@dataclass(frozen=True)
class Remote:
    """Runs cohorts at their sites. ``seconds`` is how long a round may take."""

    roster: Roster
    config: RunConfig
    seconds: float

    def clients(self) -> Mapping[str, int]:
        """The sites that are there now."""
        return {name: member.num_examples for name, member in self.roster.present().items()}

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
                checked(reply)
                assert isinstance(reply, Parcel)
                metrics = json.loads(reply.text("metrics"))
                yield ClientMetrics(info.id, {str(k): float(v) for k, v in metrics.items()}, {})
            except (ParcelError, ValueError, TypeError, AttributeError) as error:
                _log.warning("site %s was not evaluated: %s", info.id, error)

    def _asked(
        self, cohort: Sequence[ClientInfo], question: Callable[[ClientInfo, bool], Parcel]
    ) -> Iterator[tuple[ClientInfo, Parcel | Lost]]:
        """Answers of a cohort; a site that lacks what it should hold is asked again with all."""
        until = time.monotonic() + self.seconds
        present = self.roster.present()
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
            checked(reply)
            assert isinstance(reply, Parcel)
            if reply.text("site") != info.id:
                raise ParcelError(f"it now calls itself {reply.text('site')!r}")
            if reply.whole("round") != info.round:
                raise ParcelError(f"it is of round {reply.whole('round')}, not {info.round}")
            tensors = decode(up, reply.body, like)
            metrics = {key: reply.number(key) for key in ("loss", "steps")}
            count = reply.whole("num_examples")
        except (ParcelError, WireError) as error:
            return Failure(info.id, str(error))
        adapter = AdapterState(tensors, view.scaling)
        encoded = None if up == "fp32" else num_bytes(up, like)
        return Update(info.id, adapter, count, metrics, encoded)


def checked(reply: Parcel | Lost) -> None:
    """Raise ParcelError for an answer that is none, that says it failed, or is too old."""
    if isinstance(reply, Lost):
        raise ParcelError(reply.reason)
    if "error" in reply.head:
        raise ParcelError(str(reply.head["error"])[:300])
    if reply.head.get("protocol") != PROTOCOL:
        raise ParcelError(f"it speaks protocol {reply.head.get('protocol')!r}, not {PROTOCOL}")
    if reply.head.get("lacks") is True:
        raise ParcelError("it could not put the adapter together from what it was sent")


def run_id(config: RunConfig, folder: str) -> str:
    """What sites call a run: a hash of its configuration and its folder's name."""
    return hashlib.sha256(f"{config.model_dump_json()}{folder}".encode()).hexdigest()[:16]


def refuse_unfit(config: RunConfig) -> None:
    """ConfigError for what cannot be done across sites."""
    if config.data.test and not isinstance(config.data.test, str):
        raise ConfigError(
            "across sites data.test must name rows that the coordinator has: no rows can be cut "
            "off from those of the sites"
        )
    if isinstance(config.data.validation, float):
        raise ConfigError("across sites data.validation must name rows that the coordinator has")


def replies_in_time(
    arriving: Iterable[tuple[int, Parcel]], asked: set[int], seconds: float
) -> Iterator[tuple[int, Parcel | Lost]]:
    """Those that came, each node once and only if it was asked; ``Lost`` for the others."""
    left = set(asked)
    for node, reply in arriving:
        if node in left:
            left.remove(node)
            yield node, reply
    for node in sorted(left):
        yield node, Lost(f"no answer within {seconds:.0f} s")
