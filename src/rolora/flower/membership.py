"""Which sites take part: they say hello, show that they have the run's model, and come and go.

Sites are reached through a ``Transport``: Flower in a real run, function calls in tests. No answer
is trusted: ``attempt`` turns whatever it sets off into a reason to do without it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import NamedTuple, Protocol, TypeVar

from rolora.data.labels import class_labels
from rolora.errors import NoQuorum, RoloraError, printable
from rolora.flower.message import (
    SITE_NAME,
    MessageError,
    Scalar,
    SiteMessage,
    bounded,
    read_labels,
    reason_of,
)
from rolora.flower.versions import PROTOCOL
from rolora.model.base import Base, layout, tokenizer_digest
from rolora.run.experiment import Experiment

T = TypeVar("T")
NAME_TAKEN = "another site of this name is connected"


class Transport(Protocol):
    """Sends questions to nodes and returns their answers."""

    def nodes(self) -> Sequence[int]:
        """The nodes that can be reached now."""
        ...

    def ask(
        self, questions: Mapping[int, SiteMessage], seconds: float
    ) -> Iterator[tuple[int, SiteMessage]]:
        """Each node's answer once, as it comes; if none comes in time, an "error" that says so."""
        ...


class Hello(NamedTuple):
    """What a site has said of itself: its name, and the labels of its rows."""

    site: str
    labels: list[str]


class Member(NamedTuple):
    """A site that takes part: its node, and the number of rows that it trains on."""

    node: int
    num_examples: int


class Unusable(NamedTuple):
    """Why an answer cannot be used, in one short printable line."""

    reason: str


class Strikes(NamedTuple):
    """How often a node has left a question unanswered, and when it may be asked again."""

    number: int
    until: float


def attempt(use: Callable[[SiteMessage], T], reply: SiteMessage) -> T | Unusable:
    """What ``use`` makes of a node's answer; whatever that raises makes it an unusable one."""
    try:
        return use(checked(reply))
    except RoloraError as error:
        return Unusable(printable(str(error)[:300]))
    except Exception as error:  # an answer is anybody's: none may end the run of the others
        return Unusable(f"its answer cannot be used ({type(error).__name__})")


@dataclass
class Membership:
    """The sites of a run by name. It changes as they come and go.

    A node answers hello, then ready, then is a member; or it is refused for the whole run. One that
    leaves a question unanswered has to say hello again, and is asked later each time.
    ``registered`` gives the name that belongs to each node's key, or None without keys: then a name
    is its node's while that is there. ``notify`` receives one line for each site that joins or is
    refused.
    """

    transport: Transport
    wanted: Experiment
    run: str
    notify: Callable[[str], None]
    registered: Callable[[], Mapping[int, str] | None] = lambda: None
    hellos: dict[int, Hello] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    strikes: dict[int, Strikes] = field(default_factory=dict)

    def gather(self) -> None:
        """Wait until ``federation.sites`` sites have answered hello.

        Raises NoQuorum if too few have after ``federation.wait`` seconds.
        """
        federation = self.wanted.config.federation
        until = time.monotonic() + federation.wait
        self._greet()
        while len(self.hellos) < federation.sites:
            if time.monotonic() > until:
                why = "".join(f"; refused: {reason}" for reason in self.refused.values())
                raise NoQuorum(
                    f"{len(self.hellos)} of {federation.sites} sites (federation.sites) joined"
                    f"{why}; start the others and resume"
                )
            time.sleep(1)
            self._greet()

    def labels(self) -> list[str]:
        """``federation.labels``, or those of all sites that said hello and are not refused."""
        every = [label for hello in self.hellos.values() for label in hello.labels]
        every = self.wanted.config.federation.labels or every
        return self.wanted.kind.vocabulary(every, "the sites' rows")

    def present(self, base: Base, labels: Sequence[str]) -> Mapping[str, Member]:
        """The members that can be reached now. Nodes that are new may join."""
        self._greet()
        joined = {member.node for member in self.members.values()}
        self._admit(self.hellos.keys() - joined, base, labels)
        return self.reachable()

    def reachable(self) -> Mapping[str, Member]:
        """The members that can be reached now. Nobody is asked anything."""
        nodes = set(self.transport.nodes())
        return {name: m for name, m in sorted(self.members.items()) if m.node in nodes}

    def question(self, ask: str, body: bytes = b"", **head: Scalar) -> SiteMessage:
        """A question of this run: ``ask`` is hello, ready, train or score."""
        return SiteMessage({"ask": ask, "protocol": PROTOCOL, "run": self.run, **head}, body)

    def missed(self, node: int) -> None:
        """This node has left a question unanswered: it is asked for its hello again, in a while.

        At once after the first time, then after one, three, seven ... times ``federation.join``, so
        that silence costs the others less and less.
        """
        number = self.strikes[node].number + 1 if node in self.strikes else 1
        pause = self._patience * (2 ** min(number - 1, 20) - 1)
        self.strikes[node] = Strikes(number, time.monotonic() + pause)
        self._forget(node)

    def trained(self, site: str) -> None:
        """This site has done what it is there for: earlier silence is forgiven."""
        if site in self.members:
            self.strikes.pop(self.members[site].node, None)

    @property
    def _patience(self) -> float:
        federation = self.wanted.config.federation
        return min(federation.join, federation.deadline)

    def _greet(self) -> None:
        """Ask nodes that are new for their hello."""
        there, names = set(self.transport.nodes()), self.registered()
        new = there - self.hellos.keys() - self.refused.keys()
        if names is not None:
            new &= names.keys()  # a key that is just being registered has its name soon
        now = time.monotonic()
        due = {node for node in new if node not in self.strikes or self.strikes[node].until <= now}
        values = self.wanted.config.model_dump_json(exclude_none=True).encode()
        for node, reply in self._asked(due, self.question("hello", values)):
            who = f"node {node}" if names is None else names[node]

            def met(said: SiteMessage, node: int = node) -> Hello:
                return self._met(node, said, names, there)

            hello = attempt(met, reply)
            if isinstance(hello, Unusable):
                self._refuse(node, who, hello.reason)
                continue
            for old in [n for n, known in self.hellos.items() if known.site == hello.site]:
                self._forget(old)
            self.hellos[node] = hello

    def _asked(self, nodes: set[int], question: SiteMessage) -> Iterator[tuple[int, SiteMessage]]:
        """The answers of these nodes to the same question, as they come, but of silent ones."""
        questions = dict.fromkeys(sorted(nodes), question)
        for node, reply in self.transport.ask(questions, self._patience) if nodes else ():
            if reply.head.get("lost") is True:
                self.missed(node)
            else:
                yield node, reply

    def _met(
        self, node: int, said: SiteMessage, names: Mapping[int, str] | None, there: set[int]
    ) -> Hello:
        """A node's hello. Raises RoloraError if it cannot be used in this run."""
        mine = version("torch")
        name, theirs = said.text("site"), said.text("torch")
        if not SITE_NAME.fullmatch(name):
            raise MessageError(f"{name[:64]!r} is not a valid site name")
        if names is not None and names[node] != name:
            raise MessageError(f"it calls itself {name!r}, but its key is that of {names[node]!r}")
        if any(known.site == name and old in there for old, known in self.hellos.items()):
            raise MessageError(NAME_TAKEN)
        self.wanted.config.lora.ranks([name])
        own = read_labels(said.text("labels")) if self.wanted.kind.labelled else []
        if own:
            class_labels(own, "its rows", fewest=1)  # numbers of which one is not whole
        federation = self.wanted.config.federation
        if len(own) > federation.max_labels:
            raise MessageError(f"it has {len(own)} labels (federation.max_labels)")
        if others := set(own) - set(federation.labels or own):
            raise MessageError(f"its label {min(others)!r} is not in federation.labels")
        if theirs != mine:
            self.notify(
                f"site {name} has torch {theirs[:20]!r}, the coordinator {mine}: the last bits of "
                "the result may differ from a run on one machine"
            )
        return Hello(name, own)

    def _admit(self, nodes: set[int], base: Base, labels: Sequence[str]) -> None:
        """Have these nodes load the model and the rows, and compare the model with ``base``."""
        question = self.question("ready", json.dumps(labels).encode())
        for node in sorted(nodes):
            if unknown := set(self.hellos[node].labels) - set(labels):
                why = f"label {min(unknown)!r} is not in this run"
                self._refuse(node, self.hellos[node].site, printable(why))
        for node, reply in self._asked(nodes & self.hellos.keys(), question):
            name = self.hellos[node].site

            def ready(said: SiteMessage, node: int = node) -> Member:
                _require_same_model(said, base)
                return Member(node, said.integer("num_examples"))

            member = attempt(ready, reply)
            if isinstance(member, Unusable):
                self._refuse(node, name, member.reason)
            else:
                self.members[name] = member
                self.notify(f"site {name} joined with {member.num_examples:,} rows")
                self._note_majority()

    def _note_majority(self) -> None:
        """Say that one site of several claims most rows, where that gives it most of the weight."""
        given, sizes = self.wanted.config.aggregate, {}
        if given.weights == "num_examples" and given.max_share is None:
            sizes = {name: member.num_examples for name, member in self.members.items()}
        if len(sizes) > 2 and 2 * max(sizes.values()) > sum(sizes.values()):
            name = max(sizes, key=sizes.__getitem__)
            self.notify(
                f"site {name} claims more than half of all rows, and so decides the average: "
                "aggregate.max_share or aggregate.weights limits that"
            )

    def _refuse(self, node: int, who: str, why: str) -> None:
        self._forget(node)
        self.refused[node] = f"{who}: {why}"
        self.notify(f"site {who} is refused: {why}")

    def _forget(self, node: int) -> None:
        """Neither its labels nor its rows count any more."""
        self.hellos.pop(node, None)
        for name in [name for name, member in self.members.items() if member.node == node]:
            del self.members[name]


def _require_same_model(ready: SiteMessage, base: Base) -> None:
    """Raises MessageError if the site's model differs from the coordinator's."""
    for key, mine, fault in (
        ("base", base.digest, "it has another base model"),
        ("tokenizer", tokenizer_digest(base), "it has another tokenizer"),
        ("layout", layout(base), "its model has other layers"),
    ):
        if (theirs := ready.text(key)) != mine:
            raise MessageError(f"{fault} ({theirs[:8]}; the coordinator's is {mine[:8]})")


def checked(reply: SiteMessage) -> SiteMessage:
    """The reply if it can be used. Raises MessageError with the reason if not."""
    reply = bounded(reply.head, reply.body)
    if "error" in reply.head:
        raise MessageError(reason_of(reply.head["error"]))
    if reply.head.get("protocol") != PROTOCOL:
        said = str(reply.head.get("protocol"))[:20]
        raise MessageError(f"it speaks protocol {said}, not {PROTOCOL}")
    if reply.head.get("lacks") is True:
        raise MessageError("it could not assemble the adapter from what it was sent")
    return reply
