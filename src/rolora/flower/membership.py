"""Who takes part: sites say hello, show that they have the run's model, and come and go.

They are asked through a ``Carrier``, which is Flower in earnest and function calls in tests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

from rolora.config.schema import RunConfig
from rolora.errors import ConfigError, NoQuorum
from rolora.flower.message import PROTOCOL, SITE_NAME, Parcel, ParcelError
from rolora.model.base import Base, layout, tokenizer_digest
from rolora.tasks.classification import class_labels
from rolora.tasks.registry import task_kind


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
    tell: Callable[[str], None]
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
        every = [label for hello in self.hellos.values() for label in _labels(hello)]
        if task_kind(self.config.model.task).labelled:
            return class_labels(every, "what the sites have")
        return every

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
                if not SITE_NAME.fullmatch(hello.text("site")):
                    raise ParcelError(f"{hello.text('site')!r} is no name for a site")
                self.config.lora.ranks([hello.text("site")])
                hello.whole("num_examples")
                _labels(hello)
                self.hellos[node] = hello
                if hello.text("torch") != version("torch"):
                    self.tell(
                        f"site {hello.text('site')} has torch {hello.text('torch')}, the "
                        f"coordinator {version('torch')}: last bits may differ from one machine's"
                    )
            except (ParcelError, ConfigError) as error:
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
                self.tell(f"site {name} joined with {self.members[name].num_examples:,} rows")
            except ParcelError as error:
                self._refuse(node, name, str(error))

    def _refuse(self, node: int, who: str, why: str) -> None:
        self.refused[node] = f"{who}: {why}"
        self.tell(f"site {who} is refused: {why}")

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
