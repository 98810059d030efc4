"""Runs that a fault befalls: prepared, disturbed in a child process, resumed, and compared.

A run folder is kept as it is between two rounds. A trial copies it, lets the n-th file operation of
what comes next go wrong, resumes with the command line until the run is done, and compares what the
run leaves with that of the undisturbed run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from injection import BROKEN, ENDS, Operation, in_child, inject, possible
from tiny_site import make_site

from rolora.cli import main as cli
from rolora.config.load import load_config
from rolora.files import DOOMED, TEMPORARY, write_file
from rolora.model import base
from rolora.results.runs import load_run, summarise
from rolora.run import experiment, runs

ROUNDS = 4
KINDS = {  # what is trained with -> its overrides
    "rolora": (),
    "rolora, int8 uploads": ("wire.up=int8",),
    "fedsa_lora, personal B": ("method.name=fedsa_lora",),
}
EVERY_KIND = (
    f"train.rounds={ROUNDS}",
    "partition.clients=4",
    "train.participation=0.5",  # a client is new in round 3
    "data.validation=0.2",
    "train.bank=4",
    "model.dtype=fp32",
    "train.cache=",
)
# part of a run -> how many rounds, round 0 included, are committed before it
PARTS = {
    "the start, and the evaluation before training": -1,
    "a round that trains A, with an evaluation": 2,
    "a round that trains B": 3,
    "the end: adapter and report": ROUNDS + 1,
}
# what else is trained with is tried where it makes a difference
PARTS_OF = {
    "rolora": list(PARTS),
    "rolora, int8 uploads": ["a round that trains A, with an evaluation"],
    "fedsa_lora, personal B": ["a round that trains B"],
}
SEED = 16


def no_page() -> contextlib.AbstractContextManager[object]:
    """No report that takes longer than the run; it is written in the same way."""
    return mock.patch.object(runs, "write_report", lambda runs, out: write_file(out, "a page\n"))


_loaded: dict[str, base.Base] = {}


def loaded_before() -> contextlib.AbstractContextManager[object]:
    """A base model is loaded once and then taken from memory, also by forked processes."""
    real = base.load_base

    def load(*given: Any, **named: Any) -> base.Base:
        key = repr((given, named))
        if key not in _loaded:
            _loaded[key] = real(*given, **named)
        return _loaded[key]

    return mock.patch.object(experiment, "load_base", load)


def command(*words: object) -> None:
    """The command line, in this process, up to its exit."""
    sys.argv = ["rolora", *map(str, words)]
    with no_page(), loaded_before():
        cli.main()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_by(run: Path) -> dict[str, Any]:
    """What a finished run leaves: the adapter's files, its lines, and what clients keep."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    newest = {}
    for file in sorted((run / "clients").glob("*/*.safetensors")):
        newest[f"{file.parent.name} {file.name.partition('-')[0]}"] = digest(file)
    adapter = {file.name: digest(file) for file in (run / "adapter").iterdir()}
    return {"adapter": adapter, "lines": lines, "clients": newest}


def left_over(run: Path) -> list[str]:
    """Files half written or half deleted, and folders that were to become this one."""
    found = [*run.rglob(f"{TEMPORARY}*"), *run.rglob(f"{DOOMED}*")]
    found += run.parent.glob(f"{TEMPORARY}{run.name}-*")
    return [str(path.relative_to(run.parent)) for path in found]


@dataclass(frozen=True)
class Place:
    """A tiny model, its rows, and the run as it is between two rounds: ``kept/NAME``."""

    folder: Path
    kind: str

    @property
    def config(self) -> Path:
        return self.folder / "site" / "run.toml"

    def kept(self, part: str) -> Path:
        return self.folder / self.kind.partition(",")[0] / f"before-{PARTS[part]}"

    @property
    def undisturbed(self) -> Path:
        return self.folder / self.kind.partition(",")[0] / "undisturbed"

    def prepare(self) -> None:
        """Run it once, and keep a copy of the folder before each part.

        In this process, so that those which are forked off have everything loaded.
        """
        if not self.config.exists():
            self.config.parent.mkdir()
            make_site(self.config.parent)
        with no_page():
            run = self.start(self.undisturbed)
            for committed, _ in enumerate(run.rounds(), start=1):
                for part, before in PARTS.items():
                    if before == committed:
                        shutil.copytree(self.undisturbed, self.kept(part))
        with loaded_before():
            runs.resume(self.undisturbed)
        summarise([load_run(self.undisturbed)])

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def operations(self, part: str) -> list[Operation]:
        """The file operations of this part, in order, counted in a run of its own."""
        trial = self.trial(part)
        log = self.folder / "operations.json"

        def count() -> None:
            found = inject(trial)
            length = None if part.startswith("the end") else 1
            with no_page(), loaded_before():
                out = trial / "run"
                run = self.start(out) if PARTS[part] < 0 else runs.resume(out)
                list(itertools.islice(run.rounds(), length))
            log.write_text(json.dumps(found.seen))
            os._exit(0)  # before the generator is closed

        assert in_child(count, self.folder / "said.txt") == 0, self.said()
        return [(kind, path, unsafe) for kind, path, unsafe in json.loads(log.read_text())]

    def trial(self, part: str) -> Path:
        """A folder with nothing but the run as it is before this part."""
        trial = self.folder / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir()
        if PARTS[part] >= 0:
            shutil.copytree(self.kept(part), trial / "run")
        return trial

    def go_on(self, trial: Path, at: int = 0, fault: str = "") -> int:
        """Start or resume it, to its end; the exit code. With the command line if it has a fault
        that it should tell of."""
        run = trial / "run"

        def work() -> None:
            inject(trial, at, fault)
            if fault not in (*ENDS, ""):
                again = ("resume", run) if run.exists() else ("run", *self.words, "--out", run)
                return command(*again)
            with no_page(), loaded_before():
                for _ in (runs.resume(run) if run.exists() else self.start(run)).rounds():
                    continue
            return None

        return in_child(work, self.folder / "said.txt")

    @property
    def words(self) -> list[str]:
        """The configuration and its overrides, for the command line."""
        return [str(self.config), *EVERY_KIND, *KINDS[self.kind]]

    def start(self, out: Path) -> runs.Run:
        """The run in a new folder."""
        return runs.start(load_config(self.config, self.words[1:]), out)


@dataclass(frozen=True)
class Trial:
    """One fault, or two: the second befalls the resume."""

    part: str
    fault: str
    at: int
    operation: str
    again: int | None = None

    def __str__(self) -> str:
        twice = "" if self.again is None else f", then killed before operation {self.again}"
        return f"{self.part}: {self.fault} at operation {self.at} ({self.operation}){twice}"


def trials(place: Place, part: str, faults: Sequence[str], twice: bool = False) -> Iterator[Trial]:
    """Every fault at every operation; ``twice``: each kill again, with a second one somewhere."""
    seen = place.operations(part)
    named = [f"{kind} {path}" for kind, path, _ in seen] + ["what comes next"]
    rng = random.Random(f"{SEED} {place.kind} {part}")
    for fault, at in possible(seen, tuple(faults)):
        if at > len(seen) and PARTS[part] > ROUNDS:
            continue  # the run's process ends there by itself
        yield Trial(part, fault, at, named[at - 1])
        if twice and fault == "killed":
            yield Trial(part, fault, at, named[at - 1], rng.randint(1, len(seen)))


def outcome(place: Place, trial: Trial, expected: dict[str, Any]) -> str:
    """What is wrong after this trial; "" if nothing is."""
    folder = place.trial(trial.part)
    code = place.go_on(folder, trial.at, trial.fault)
    if wrong := badly_ended(trial.fault, code, place.said()):
        return wrong
    if trial.again is not None and place.go_on(folder, trial.again, "killed") not in (0, -9):
        return f"the resume that was to be killed failed: {place.said()[-500:]}"
    if (code := place.go_on(folder)) != 0:
        return f"the resume ended with {code}: {place.said()[-500:]}"
    found = left_by(folder / "run")
    if other := [key for key in expected if found[key] != expected[key]]:
        return f"other {', '.join(other)} than those of the undisturbed run"
    if left := left_over(folder / "run"):
        return f"left behind: {left}"
    return ""


def badly_ended(fault: str, code: int, said: str) -> str:
    """What is wrong with how the process ended that the fault befell; "" if nothing is."""
    if fault in ENDS:
        return "" if code == -9 else f"it was not killed but ended with {code}: {said[-300:]}"
    number = errno.ENOSPC if fault == "disk full" else errno.EIO
    *_, last = said.splitlines() or [""]
    clear = last.startswith("rolora: ") and os.strerror(number) in last
    if code == 0 and fault == "I/O error":
        return ""  # of something that is not needed, such as the end of a file that is deleted
    if code == BROKEN or "Traceback" in said:
        return f"a traceback: {said[-500:]}"
    return "" if code == 1 and clear else f"ended with {code} and said: {last}"
