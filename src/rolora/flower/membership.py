"""Which sites take part: they say hello, show that they have the run's model, and come and go.

Sites are reached through a ``Transport``: Flower in a real run, function calls in tests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import NamedTuple, Protocol

from rolora.errors import ConfigError, NoQuorum
from rolora.flower.message import (
    PROTOCOL,
    SITE_NAME,
    MessageError,
    Scalar,
    SiteMessage,
    read_labels,
    reason_of,
)
from rolora.model.base import Base, layout, tokenizer_digest
from rolora.run.experiment import Experiment


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


@dataclass
class Membership:
    """The sites of a run by name. It changes as they come and go.

    A node answers hello, then ready, then is a member; or it is refused for the whole run.
    ``notify`` receives one line for each site that joins or is refused.
    """

    transport: Transport
    wanted: Experiment
    run: str
    notify: Callable[[str], None]
    hellos: dict[int, Hello] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def gather(self) -> list[str]:
        """Wait until ``federation.sites`` sites have answered hello; return all their labels.

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
        every = [label for hello in self.hellos.values() for label in hello.labels]
        return self.wanted.kind.vocabulary(every, "the sites' rows")

    def present(self, base: Base, labels: Sequence[str]) -> Mapping[str, Member]:
        """The members that can be reached now. Nodes that are new may join."""
        nodes = self._greet()
        joined = {member.node for member in self.members.values()}
        self._admit(nodes & self.hellos.keys() - joined - self.refused.keys(), base, labels)
        return {name: m for name, m in sorted(self.members.items()) if m.node in nodes}

    def question(self, ask: str, body: bytes = b"", **head: Scalar) -> SiteMessage:
        """A question of this run: ``ask`` is hello, ready, train or score."""
        return SiteMessage({"ask": ask, "protocol": PROTOCOL, "run": self.run, **head}, body)

    def _greet(self) -> set[int]:
        """Ask new nodes for their hello; return all nodes that can be reached."""
        nodes = set(self.transport.nodes())
        values = self.wanted.config.model_dump_json(exclude_none=True).encode()
        question = self.question("hello", values)
        for node, reply in self._asked(nodes - self.hellos.keys() - self.refused.keys(), question):
            try:
                self.hellos[node] = self._checked_hello(reply)
            except (MessageError, ConfigError) as error:
                self._refuse(node, f"node {node}", str(error))
        return nodes

    def _asked(self, nodes: set[int], question: SiteMessage) -> Iterator[tuple[int, SiteMessage]]:
        """The answers of these nodes to the same question, as they come."""
        deadline = self.wanted.config.federation.deadline
        return self.transport.ask(dict.fromkeys(nodes, question), deadline)

    def _checked_hello(self, reply: SiteMessage) -> Hello:
        """Raises MessageError, or ConfigError if ``lora.rank`` has no rank for this site."""
        said, mine = checked(reply), version("torch")
        name, theirs = said.text("site"), said.text("torch")
        if not SITE_NAME.fullmatch(name):
            raise MessageError(f"{name!r} is not a valid site name")
        self.wanted.config.lora.ranks([name])
        hello = Hello(name, read_labels(said.text("labels")))
        if theirs != mine:
            self.notify(
                f"site {name} has torch {theirs}, the coordinator {mine}: the last bits of the "
                "result may differ from a run on one machine"
            )
        return hello

    def _admit(self, nodes: set[int], base: Base, labels: Sequence[str]) -> None:
        """Have these nodes load the model and the rows, and compare the model with ``base``."""
        question = self.question("ready", json.dumps(labels).encode())
        for node, reply in self._asked(nodes, question):
            name, own = self.hellos[node]
            try:
                ready = checked(reply)
                _require_same_model(ready, base)
                known = self.members.get(name)
                if known is not None and known.node in self.transport.nodes():
                    raise MessageError("another site of this name is connected")
                if unknown := set(own) - set(labels):
                    raise MessageError(f"label {min(unknown)!r} is not in this run")
                self.members[name] = Member(node, ready.integer("num_examples"))
                self.notify(f"site {name} joined with {self.members[name].num_examples:,} rows")
            except MessageError as error:
                self._refuse(node, name, str(error))

    def _refuse(self, node: int, who: str, why: str) -> None:
        self.refused[node] = f"{who}: {why}"
        self.notify(f"site {who} is refused: {why}")


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
    if "error" in reply.head:
        raise MessageError(reason_of(reply.head["error"]))
    if reply.head.get("protocol") != PROTOCOL:
        raise MessageError(f"it speaks protocol {reply.head.get('protocol')!r}, not {PROTOCOL}")
    if reply.head.get("lacks") is True:
        raise MessageError("it could not assemble the adapter from what it was sent")
    return reply
