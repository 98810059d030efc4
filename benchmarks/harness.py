"""Run parties side by side, in turns, and write down what they took.

A party is a process that loads everything, says so, and then does the same piece of work whenever
it is asked (party.py). All parties of a bench stay loaded while they take turns, the order rotated
from repetition to repetition, so that whatever else the machine does hits all of them. The harness
knows nothing of what it times.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.processes import Watch
from benchmarks.statistics import rotated
from rolora.files import write_file


@dataclass(frozen=True)
class Party:
    """A name, the command that starts the process, and how often it takes part.

    With ``every`` = 3 a slow party takes part in every third repetition only.
    """

    name: str
    command: tuple[str, ...]
    every: int = 1


@dataclass(frozen=True)
class Sample:
    """One repetition of one party. ``load`` is the 1-minute load average when it began."""

    repetition: int
    seconds: float
    cpu_seconds: float
    peak_kib: int
    load: float
    answer: Mapping[str, Any]


@dataclass
class Outcome:
    """All of one party: how long it took to get ready, its first run, and its samples.

    The first run fills caches and is not among the samples. ``failed`` says why there are none.
    """

    cold_seconds: float = 0.0
    first: Sample | None = None
    samples: list[Sample] = field(default_factory=list)
    failed: str | None = None


class PartyFailed(Exception):
    """The process ended or answered nonsense; the message is the end of what it printed."""


class Running:
    """A started party: requests go to its standard input, answers come through a pipe."""

    def __init__(self, party: Party, environment: Mapping[str, str], log: IO[bytes]) -> None:
        self.party = party
        self.log = log
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            party.command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment, "ANSWERS": str(writing)},
            pass_fds=(writing,),
            text=True,
        )
        os.close(writing)
        self.answers = os.fdopen(reading)

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises PartyFailed if the process ended instead."""
        line = self.answers.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.log.flush()
        printed = Path(self.log.name).read_text(errors="replace").strip().splitlines()
        raise PartyFailed(printed[-1] if printed else "it ended without a word")

    def ask(self, what: str) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then answer() says why
            self.process.stdin.write(json.dumps({"do": what}) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def measure(self, repetition: int) -> Sample:
        """Prepare, then run once under the clock."""
        self.ask("prepare")
        load = os.getloadavg()[0]
        with Watch(self.process.pid) as watch:
            started = time.perf_counter()
            answer = self.ask("run")
            seconds = time.perf_counter() - started
        cost = watch.cost
        answer |= self.ask("after")
        return Sample(repetition, seconds, cost.cpu_seconds, cost.peak_kib, load, answer)

    def stop(self) -> None:
        """Close its input, which ends it, and wait."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()


def measure(
    parties: Sequence[Party], repetitions: int, environment: Mapping[str, str]
) -> dict[str, Outcome]:
    """Name -> outcome after ``repetitions`` turns of every party, in rotated order.

    A party that breaks is recorded as failed with what it said last; the others go on.
    """
    outcomes = {party.name: Outcome() for party in parties}
    with contextlib.ExitStack() as stack:
        running: dict[str, Running] = {}
        for party in parties:
            with _noting_failure(outcomes[party.name]):
                log = stack.enter_context(tempfile.NamedTemporaryFile(suffix=f"-{party.name}.log"))
                started = time.perf_counter()
                one = Running(party, environment, log)
                stack.callback(one.stop)
                one.answer()
                outcomes[party.name].cold_seconds = time.perf_counter() - started
                outcomes[party.name].first = one.measure(-1)
                running[party.name] = one
        for repetition in range(repetitions):
            for name in rotated([party.name for party in parties], repetition):
                one_running = running.get(name)
                if one_running is None or repetition % one_running.party.every:
                    continue
                with _noting_failure(outcomes[name]):
                    outcomes[name].samples.append(one_running.measure(repetition))
                if outcomes[name].failed:
                    del running[name]
    return outcomes


@contextlib.contextmanager
def _noting_failure(outcome: Outcome) -> Iterator[None]:
    try:
        yield
    except (PartyFailed, OSError, ValueError) as error:
        outcome.failed = str(error)


def write_record(
    folder: Path,
    name: str,
    outcomes: Mapping[str, Outcome],
    setting: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> Path:
    """``folder/name.json``, whole or not at all: setting, machine, and every single sample."""
    record = {
        "bench": name,
        "setting": dict(setting),
        "machine": dict(machine),
        "parties": {party: asdict(outcome) for party, outcome in outcomes.items()},
    }
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{name}.json", text)
    return folder / f"{name}.json"


def machine() -> dict[str, Any]:
    """Processor, cores, memory, kernel and the load as it is now; no names of hosts or users."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "load": list(os.getloadavg()),
    }
