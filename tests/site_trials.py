"""A site's process that a fault befalls while it answers, and the next process of that site.

The questions are those of a run across three sites, by function calls. A SuperLink of one folder
delivers each of them once, as Flower's does, and keeps the answers.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import calls
import tomli_w
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from injection import Operation, in_child, inject, possible
from trials import SEED, Trial, badly_ended, command, no_page

from rolora.flower.message import SiteMessage
from rolora.flower.transport import TYPES, from_record, to_record
from rolora.sites import node
from rolora.sites.flower_internals import from_bytes, to_bytes
from rolora.sites.site import Site
from rolora.sites.site_config import SiteConfig

KINDS = {
    "rolora, int8 uploads": ("wire.up=int8",),
    "fedsa_lora, personal B": ("method.name=fedsa_lora",),
}
NODE = 7
PARTS = {"a site's answer, A trained": 2, "a site's answer, B trained": 3}  # and their rounds
PART_OF = dict(zip(KINDS, PARTS, strict=True))


@dataclass
class SuperLink:
    """In a folder: questions to deliver, each once, and the answers that came."""

    folder: Path
    id: int = NODE

    def send(self, name: str, question: bytes) -> None:
        (self.folder / "questions").mkdir(parents=True, exist_ok=True)
        (self.folder / "questions" / name).write_bytes(question)

    def pull(self) -> Message | None:
        for file in sorted((self.folder / "questions").iterdir()):
            message = from_bytes(file.read_bytes())
            file.rename(self.folder / f"delivered-{file.name}")
            return message
        raise SystemExit(0)

    def push(self, message: Message, seconds: float) -> None:
        said = from_record(message.content)
        text = json.dumps({"head": dict(said.head), "body": said.body.hex()})
        (self.folder / f"answer-{message.metadata.group_id}").write_text(text)

    def answer(self, name: str) -> str:
        """The answer to this question, as text; "" if none came."""
        file = self.folder / f"answer-{name}"
        return file.read_text() if file.exists() else ""


def flower_identity() -> None:
    """What Flower sets in the processes that it starts."""
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)


@dataclass
class Recorded:
    """A site whose state before each training question, and whose answers, are kept."""

    site: Site
    kept: Path
    asked: list[int] = field(default_factory=list)

    @property
    def config(self) -> SiteConfig:
        return self.site.config

    def answer(self, question: SiteMessage) -> SiteMessage:
        if question.head["ask"] != "train":
            return self.site.answer(question)
        round = question.integer("round")
        shutil.copytree(self.config.folder, self.kept / f"state-{round}")
        ask = TYPES[question.text("ask")]
        sent = Message(to_record(question), NODE, ask, group_id=str(round), ttl=86400.0)
        (self.kept / f"question-{round}").write_bytes(to_bytes(sent))
        reply = self.site.answer(question)
        text = json.dumps({"head": dict(reply.head), "body": reply.body.hex()})
        (self.kept / f"answer-{round}").write_text(text)
        return reply


@dataclass(frozen=True)
class SitePlace:
    """A run across sites, as seen by the first of them."""

    folder: Path
    kind: str

    @property
    def kept(self) -> Path:
        return self.folder / "kept"

    def prepare(self) -> None:
        """Run it once, and keep what the first site was asked, had and answered."""
        flower_identity()
        self.kept.mkdir()
        place = calls.make_place(self.folder)
        transport = calls.calls(place, self.folder / "states")
        first: Any = Recorded(transport.sites[10], self.kept)
        transport.sites[10] = first
        config = calls.configuration(
            place, "train.rounds=4", "train.participation=1.0", *KINDS[self.kind]
        )
        with no_page():
            for _ in calls.remote(config, self.folder / "run", transport).rounds():
                continue
        own = first.config.model_dump(exclude_none=True, exclude={"root", "state"})
        own["state"] = str(self.folder / "trial" / "state")
        (self.folder / "site.toml").write_text(tomli_w.dumps(own))

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def trial(self, part: str) -> SuperLink:
        """The site as it was before the question of this part, which the SuperLink now has."""
        trial, round = self.folder / "trial", PARTS[part]
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(self.kept / f"state-{round}", trial / "state")
        link = SuperLink(trial)
        link.send(str(round), self.question(round))
        return link

    def question(self, round: int) -> bytes:
        return (self.kept / f"question-{round}").read_bytes()

    def expected(self, round: int) -> str:
        return (self.kept / f"answer-{round}").read_text()

    def serve(self, link: SuperLink, at: int = 0, fault: str = "", log: Path | None = None) -> int:
        """The site's process, until there are no more questions; its exit code."""

        def work() -> None:
            flower_identity()
            found = inject(link.folder / "state", at, fault)

            class Joined:
                @staticmethod
                @contextmanager
                def join(site: SiteConfig, last: int | None = None) -> Iterator[SuperLink]:
                    yield link

            vars(node)["Fleet"] = Joined
            try:
                command("site", "--config", self.folder / "site.toml")
            finally:
                if log is not None:
                    log.write_text(json.dumps(found.seen))

        return in_child(work, self.folder / "said.txt")

    def operations(self, part: str) -> list[Operation]:
        """The file operations in the site's folder while it answers this part's question."""
        log = self.folder / "operations.json"
        link = self.trial(part)
        assert self.serve(link, log=log) == 0, self.said()
        assert link.answer(str(PARTS[part])) == self.expected(PARTS[part]), self.said()
        return [(kind, path, unsafe) for kind, path, unsafe in json.loads(log.read_text())]


def trials(place: SitePlace, part: str, faults: tuple[str, ...]) -> Iterator[Trial]:
    """Every fault at every operation; each kill once more with a second one at a drawn place."""
    seen = place.operations(part)
    before = [""] + [f" after {kind} {path}" for kind, path, _ in seen]
    named = [
        f"{kind} {path}{last if path == '.' else ''}"  # a folder by itself says nothing
        for (kind, path, _), last in zip(seen, before, strict=False)
    ] + ["what comes next"]
    rng = random.Random(f"{SEED} {place.kind} {part}")
    for fault, at in possible(seen, faults):
        if at > len(seen):
            continue  # its process ends when there are no more questions
        yield Trial(part, fault, at, named[at - 1])
        if fault == "killed":
            yield Trial(part, fault, at, named[at - 1], rng.randint(1, len(seen)))


def outcome(place: SitePlace, trial: Trial) -> str:
    """What is wrong after this trial; "" if nothing is."""
    round, link = PARTS[trial.part], place.trial(trial.part)
    code = place.serve(link, trial.at, trial.fault)
    refused = '"error": "disk"' in link.answer(str(round))
    if code != 0 and (wrong := badly_ended(trial.fault, code, place.said())):
        return wrong
    if trial.again is not None and place.serve(link, trial.again, "killed") not in (0, -9):
        return f"the second process failed: {place.said()[-500:]}"
    if (code := place.serve(link)) != 0:
        return f"the next process ended with {code}: {place.said()[-500:]}"
    taken = "question.bin" in trial.operation or "node" in trial.operation
    if refused or (not link.answer(str(round)) and taken):
        # the coordinator counts the site as away, and asks again
        link.send(str(round), place.question(round))
        assert place.serve(link) == 0, place.said()
    link.send(str(round + 1), place.question(round + 1))
    if (code := place.serve(link)) != 0:
        return f"the process after it ended with {code}: {place.said()[-500:]}"
    for number in (round, round + 1):
        if (found := link.answer(str(number))) != place.expected(number):
            return f"another answer in round {number}: {found[:300] or 'none'}"
    return _damage(link.folder / "state")


def _damage(state: Path) -> str:
    """What is wrong with the files of a site that has gone on; "" if nothing is."""
    if left := [path.name for path in state.rglob(".part-*")]:
        return f"left behind: {left}"
    logged: list[Mapping[str, Any]] = []
    for line in (state / "outgoing.log").read_text().splitlines():
        try:
            logged.append(json.loads(line))
        except ValueError:
            continue  # cut off by a kill; it must not have spoilt the line after it
    told = [entry["left"].get("round") for entry in logged if entry["asked"] == "train"]
    wanted = [entry for entry in told if entry is not None]
    return "" if sorted(set(wanted)) == list(range(1, max(wanted) + 1)) else f"logged: {told}"
