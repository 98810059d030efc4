"""Which sites take part: they say hello, show that they have the run's model, and come and go.

Sites are reached through a ``Transport``: Flower in a real run, function calls in tests. No answer
is trusted: ``attempt`` turns any error that it causes into a reason not to use it. Before the first
round, connected sites are waited for; those that connect later are asked in the background.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
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

    def in_background(self, work: Callable[[], T]) -> Future[T]:
        """Do this in the background, during rounds. It may call ``ask``."""
        ...


class Hello(NamedTuple):
    """What a site has said of itself: its name, the labels of its rows, and its torch."""

    site: str
    labels: list[str]
    torch: str


class Member(NamedTuple):
    """A site that takes part: its node, and the number of rows that it trains on."""

    node: int
    num_examples: int


class Known(NamedTuple):
    """What a hello is checked against.

    The connected nodes, the names that belong to their keys (None without keys), who has said
    hello, and the run's labels once they are fixed.
    """

    connected: AbstractSet[int]
    names: Mapping[int, str] | None
    hellos: Mapping[int, Hello]
    labels: Sequence[str] | None

    def name_of(self, node: int) -> str:
        """What a node is called before its hello is believed."""
        return f"node {node}" if self.names is None else self.names[node]


class Asked(NamedTuple):
    """A node that is asked in the background: with which labels, and its future answers."""

    labels: Sequence[str]
    answers: Future[tuple[SiteMessage, ...]]


class Unusable(NamedTuple):
    """Why an answer cannot be used, in one short printable line."""

    reason: str


class Silences(NamedTuple):
    """How often a node has left a question unanswered, and when it may be asked again."""

    number: int
    until: float


def attempt(use: Callable[[SiteMessage], T], reply: SiteMessage) -> T | Unusable:
    """``use`` applied to a node's answer; whatever it raises makes the answer unusable."""
    try:
        return use(checked(reply))
    except RoloraError as error:
        return Unusable(printable(str(error)[:300]))
    except Exception as error:  # an answer may be anything: it must not end the run of the others
        return Unusable(f"its answer cannot be used ({type(error).__name__})")


@dataclass
class Membership:
    """The sites of a run by name. It changes as they come and go.

    A node answers hello, then ready, then is a member; or it is refused for the whole run. One that
    leaves a question unanswered has to say hello again, after a longer pause each time.
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
    silences: dict[int, Silences] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)

    def gather(self) -> None:
        """Wait until ``federation.sites`` sites have answered hello.

        Raises NoQuorum if too few have after ``federation.wait`` seconds.
        """
        federation = self.wanted.config.federation
        until = time.monotonic() + federation.wait
        self._ask_hello(self._known())
        while len(self.hellos) < federation.sites:
            if time.monotonic() > until:
                why = "".join(f"; refused: {reason}" for reason in self.refused.values())
                raise NoQuorum(
                    f"{len(self.hellos)} of {federation.sites} sites (federation.sites) joined"
                    f"{why}; start the others and resume"
                )
            time.sleep(1)
            self._ask_hello(self._known())

    def labels(self) -> list[str]:
        """``federation.labels``, or those of all sites that said hello and are not refused."""
        every = [label for hello in self.hellos.values() for label in hello.labels]
        every = self.wanted.config.federation.labels or every
        return self.wanted.kind.vocabulary(every, "the sites' rows")

    def load_model(self, base: Base, labels: Sequence[str]) -> None:
        """Have every connected site load the model, again if need be, and wait for their answers.

        A node that has left a question unanswered is not waited for again.
        """
        self._ask_hello(self._known(labels), but=self.silences.keys())
        for node, reply in self._replies(self.hellos.keys(), self._ready(labels)):
            self._join(node, reply, base)

    def present(self, base: Base, labels: Sequence[str]) -> Mapping[str, Member]:
        """The members that can be reached now. Nobody is waited for.

        New nodes are asked to join; those that have answered since the last call join now.
        """
        known = self._known(labels)
        for node in [node for node, one in self.asked.items() if one.answers.done()]:
            self._take_answers(node, self.asked.pop(node), base, known)
        before = known._replace(hellos=dict(self.hellos))  # what another thread may read
        joined = {member.node for member in self.members.values()}
        for node in sorted(self._due(known) - joined):
            work = partial(self._ask_both, node, before, self._ready(labels))
            self.asked[node] = Asked(labels, self.transport.in_background(work))
        return self.reachable()

    def reachable(self) -> Mapping[str, Member]:
        """The members that can be reached now. Nobody is asked anything."""
        nodes = set(self.transport.nodes())
        return {name: m for name, m in sorted(self.members.items()) if m.node in nodes}

    def question(self, ask: str, body: bytes = b"", **head: Scalar) -> SiteMessage:
        """A question of this run: ``ask`` is hello, ready, train or score."""
        return SiteMessage({"ask": ask, "protocol": PROTOCOL, "run": self.run, **head}, body)

    def missed(self, node: int) -> None:
        """This node has left a question unanswered: its hello is asked for again, later.

        At once after the first time, then after 1, 3, 7 ... times ``federation.join``, so that a
        site that never answers costs the others less and less.
        """
        number = self.silences[node].number + 1 if node in self.silences else 1
        pause = self._timeout * (2 ** min(number - 1, 20) - 1)
        self.silences[node] = Silences(number, time.monotonic() + pause)
        self._forget(node)

    def trained(self, site: str) -> None:
        """This site has trained: earlier questions without an answer no longer count."""
        if site in self.members:
            self.silences.pop(self.members[site].node, None)

    @property
    def _timeout(self) -> float:
        federation = self.wanted.config.federation
        return min(federation.join, federation.deadline)

    @property
    def _hello(self) -> SiteMessage:
        values = self.wanted.config.model_dump_json(exclude_none=True).encode()
        return self.question("hello", values)

    def _ready(self, labels: Sequence[str]) -> SiteMessage:
        """Have a site load the model and its rows."""
        return self.question("ready", json.dumps(labels).encode())

    def _known(self, labels: Sequence[str] | None = None) -> Known:
        return Known(set(self.transport.nodes()), self.registered(), self.hellos, labels)

    def _due(self, known: Known) -> set[int]:
        """The nodes that are there and may be asked now."""
        due = known.connected - self.refused.keys() - self.asked.keys()
        if known.names is not None:
            due &= known.names.keys()  # a key that is just being registered has its name soon
        now = time.monotonic()
        return due - {node for node, one in self.silences.items() if one.until > now}

    def _ask_hello(self, known: Known, but: AbstractSet[int] = frozenset()) -> None:
        """Ask nodes that are new for their hello, and wait for it."""
        new = self._due(known) - self.hellos.keys() - but
        for node, reply in self._replies(new, self._hello):
            self._take_hello(node, reply, known)

    def _replies(
        self, nodes: AbstractSet[int], question: SiteMessage
    ) -> Iterator[tuple[int, SiteMessage]]:
        """The answers of these nodes to a question, as they come; the others have ``missed`` it."""
        questions = dict.fromkeys(sorted(nodes), question)
        for node, reply in self.transport.ask(questions, self._timeout):
            if reply.head.get("lost") is True:
                self.missed(node)
            else:
                yield node, reply

    def _ask_both(self, node: int, known: Known, ready: SiteMessage) -> tuple[SiteMessage, ...]:
        """A node's answers to hello and, if that can be used, to ready.

        This runs in the background and changes nothing: ``_take_answers`` checks the answers.
        """

        def answer(question: SiteMessage) -> SiteMessage:
            ((_, reply),) = self.transport.ask({node: question}, self._timeout)
            return reply

        said = answer(self._hello)
        if isinstance(attempt(partial(self._checked_hello, node, known), said), Unusable):
            return (said,)
        return said, answer(ready)

    def _take_answers(self, node: int, asked: Asked, base: Base, known: Known) -> None:
        """Use what a node has answered in the background."""
        if asked.labels != known.labels or (known.names is not None and node not in known.names):
            return
        if error := asked.answers.exception():
            fault = type(error).__name__
            self.notify(f"site {known.name_of(node)} could not be asked to join ({fault})")
            self.missed(node)
            return
        said, *more = asked.answers.result()
        if [said, *more][-1].head.get("lost") is True:
            self.missed(node)
            return
        self._take_hello(node, said, known)
        if more and node in self.hellos:
            self._join(node, more[0], base)

    def _take_hello(self, node: int, reply: SiteMessage, known: Known) -> None:
        """Keep this node's hello, or refuse the node."""
        hello = attempt(partial(self._checked_hello, node, known), reply)
        if isinstance(hello, Unusable):
            self._refuse(node, known.name_of(node), hello.reason)
            return
        if hello.torch != (mine := version("torch")):
            self.notify(
                f"site {hello.site} has torch {hello.torch[:20]!r}, the coordinator {mine}: the "
                "last bits of the result may differ from a run on one machine"
            )
        for old in [n for n, met in self.hellos.items() if met.site == hello.site and n != node]:
            self._forget(old)
        self.hellos[node] = hello

    def _checked_hello(self, node: int, known: Known, said: SiteMessage) -> Hello:
        """A node's hello. Raises RoloraError if it cannot be used in this run."""
        name, torch = said.text("site"), said.text("torch")
        if not SITE_NAME.fullmatch(name):
            raise MessageError(f"{name[:64]!r} is not a valid site name")
        if known.names is not None and known.names[node] != name:
            raise MessageError(
                f"it calls itself {name!r}, but its key is that of {known.names[node]!r}"
            )
        others = known.hellos.items()
        if any(met.site == name and n != node and n in known.connected for n, met in others):
            raise MessageError(NAME_TAKEN)
        self.wanted.config.lora.ranks([name])
        own = read_labels(said.text("labels")) if self.wanted.kind.labelled else []
        if own:
            class_labels(own, "its rows", fewest=1)  # numbers of which one is not whole
        federation = self.wanted.config.federation
        if len(own) > federation.max_labels:
            raise MessageError(f"it has {len(own)} labels (federation.max_labels)")
        if unnamed := set(own) - set(federation.labels or own):
            raise MessageError(f"its label {min(unnamed)!r} is not in federation.labels")
        if known.labels is not None and (late := set(own) - set(known.labels)):
            raise MessageError(f"label {min(late)!r} is not in this run")
        return Hello(name, own, torch)

    def _join(self, node: int, reply: SiteMessage, base: Base) -> None:
        """Make this node a member if its model is that of ``base``, or refuse it."""
        name = self.hellos[node].site

        def ready(said: SiteMessage) -> Member:
            _require_same_model(said, base)
            return Member(node, said.integer("num_examples"))

        member = attempt(ready, reply)
        if isinstance(member, Unusable):
            self._refuse(node, name, member.reason)
            return
        self.members[name] = member
        self.notify(f"site {name} joined with {member.num_examples:,} rows")
        self._note_majority()

    def _note_majority(self) -> None:
        """Report a site, one of several, whose claimed rows give it most of the weight."""
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
