"""Runs across sites without a network: a transport of function calls, and three tiny sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tiny import tiny_bert
from tiny_site import write_rows

from rolora.config.load import make_config
from rolora.config.schema import RunConfig
from rolora.flower.message import SiteMessage
from rolora.flower.transport import from_record, to_record
from rolora.run import runs
from rolora.run.runs import Run
from rolora.sites.coordinator import across
from rolora.sites.site import Site
from rolora.sites.site_config import SiteConfig

T = TypeVar("T")
NAMES = ("ann", "bob", "cy")
Spoil = Callable[[str, SiteMessage, SiteMessage], SiteMessage]  # site, question, its answer


def honest(site: str, question: SiteMessage, reply: SiteMessage) -> SiteMessage:
    return reply


def wired(message: SiteMessage) -> SiteMessage:
    """The message as it arrives."""
    return from_record(to_record(message))


@dataclass
class Calls:
    """A transport of function calls. ``away`` sites are not there; what passed is kept."""

    sites: dict[int, Site]
    spoil: Spoil = honest
    away: set[str] = field(default_factory=set)
    passed: list[tuple[str, SiteMessage, SiteMessage]] = field(default_factory=list)
    notified: list[str] = field(default_factory=list)

    def nodes(self) -> Sequence[int]:
        return [node for node, site in self.sites.items() if site.config.name not in self.away]

    def ask(
        self, questions: Mapping[int, SiteMessage], seconds: float
    ) -> Iterator[tuple[int, SiteMessage]]:
        for node, question in reversed(list(questions.items())):
            name = self.sites[node].config.name
            answer = self.sites[node].answer(wired(question))
            reply = wired(self.spoil(name, question, answer))
            self.passed.append((name, question, reply))
            yield node, reply

    def in_background(self, work: Callable[[], T]) -> Future[T]:
        """Done at once, in this thread, and heard when the next round begins."""
        return done(work)


def done(work: Callable[[], T]) -> Future[T]:
    """What the work returns or raises."""
    future: Future[T] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future


def make_place(folder: Path) -> Path:
    """A tiny model, the test rows, and a file of rows for each site."""
    tiny_bert(folder / "model")
    write_rows(folder / "test.csv", 12)
    for name, rows in zip(NAMES, (21, 9, 14), strict=True):
        write_rows(folder / f"site-{name}.csv", rows)
    return folder


def configuration(place: Path, *overrides: str) -> RunConfig:
    tables = {
        "name": "tiny",
        "server_seed": 0,  # that of a run on one machine
        "model": {"path": "model", "dtype": "fp32"},
        "lora": {"rank": 2, "alpha": 4, "target_modules": ["query", "value"]},
        "data": {"train": "site-*.csv", "test": "test.csv", "max_length": 32},
        "partition": {"scheme": "files"},
        "train": {"rounds": 6, "local_steps": 2, "batch_size": 4, "bank": 1, "cache": ""},
        "federation": {"sites": 3, "wait": 5},
    }
    return make_config(tables, ["train.participation=0.6", *overrides], root=place)


CONSENT = {"text": "text", "label": "label", "min_train_rows": 1, "min_score_rows": 1}


def calls(place: Path, state: Path, spoil: Spoil = honest, **policy: Any) -> Calls:
    """Three sites whose operators agree to ``CONSENT``, changed by ``policy``."""
    own = {**CONSENT, **policy}
    sites = {
        10 + number: Site(
            SiteConfig(
                name=f"site-{name}",
                data=f"site-{name}.csv",
                state=str(state / name),
                root=place,
                **own,
            )
        )
        for number, name in enumerate(NAMES)
    }
    return Calls(sites, spoil)


def remote(
    config: RunConfig, out: Path, transport: Calls, registered: dict[int, str] | None = None
) -> Run:
    return runs.start(config, out, across(transport, transport.notified.append, lambda: registered))
