"""A thousand rounds of a hundred clients, some of whom are away or wrong, with kills: make soak.

Everything runs through the command's own path: ``runs.start``, ``runs.resume``, ``Run.rounds``.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from injection import in_child, inject
from records import Record
from tiny_site import make_site, write_rows
from trials import left_by, left_over, no_page

from rolora.algorithm.adapter import AdapterState, Assignment, Failure, Update
from rolora.algorithm.method import Method
from rolora.config.load import load_config
from rolora.run import runs
from rolora.training.engine import ClientMetrics, Engine, Job

pytestmark = pytest.mark.slow

CLIENTS, ROUNDS, SEED = 100, 1000, 4104
KILLS, FURTHEST = 8, 600  # each kill comes before one of so many file operations
NEVER = 10**9  # file operations
# rounds of each process before its memory is watched: the resident size of an undisturbed run grows
# for 300, in steps, while what is allocated stays the same
WARM = 300
MOST_GROWTH = 1.0  # MB per 100 rounds
WRONG = {"away": 0.10, "stale": 0.02, "NaN": 0.01, "shape": 0.01}  # share of updates
SAID = {"away": "away", "stale": "is missing", "NaN": "not finite", "shape": "shape"}

ABOUT = """RoLoRA on a tiny model. Some clients do not answer, send the factor of the round \
before, values that are not numbers, or tensors of a wrong shape; each of these updates is left \
out and named. The process is killed at drawn file operations and resumed. Memory is the slope of \
the resident size, with a height of its own for each process."""


def befalls(round: int, client: str) -> str:
    """What is wrong with this client's update of this round; "" if nothing is."""
    drawn = random.Random(f"{SEED} {round} {client}").random()
    for what, share in WRONG.items():
        if drawn < share:
            return what
        drawn -= share
    return ""


@dataclass(frozen=True)
class Disturbed:
    """An engine some of whose clients do not answer, or answer what cannot be used."""

    engine: Engine

    def clients(self) -> Mapping[str, int]:
        return self.engine.clients()

    def run(self, method: Method, job: Job) -> Iterator[Update | Failure]:
        received = {assigned.info.id: assigned.received for assigned in job.cohort}
        for reply in self.engine.run(method, job):
            assert isinstance(reply, Update)
            yield spoilt(reply, befalls(job.round, reply.client), method, job, received)

    def evaluate(self, method: Method, clients: Iterable[Assignment]) -> Iterable[ClientMetrics]:
        return self.engine.evaluate(method, clients)


def spoilt(
    update: Update, how: str, method: Method, job: Job, received: Mapping[str, AdapterState]
) -> Update | Failure:
    """The update as it is, or as it comes if it is spoilt like this."""
    if not how:
        return update
    if how == "away":
        return Failure(update.client, "away")
    if how == "stale":  # that of the round before, in which the other factor was trained
        earlier = received[update.client].only(method.shared(job.round - 1))
        return replace(update, adapter=earlier)
    name = max(update.adapter)
    tensor = update.adapter[name]
    wrong = torch.full_like(tensor, torch.nan) if how == "NaN" else tensor[..., :-1].clone()
    changed = AdapterState({**update.adapter, name: wrong}, update.adapter.scaling)
    return replace(update, adapter=changed)


def go_on(config: Path, out: Path, samples: Path, kill: int, process: int) -> None:
    """Start or resume, to the end, or to a kill before file operation number ``kill``."""
    inject(out.parent, kill, "killed")
    run = runs.resume(out) if out.exists() else runs.start(load_config(config), out)
    parts, this = run.experiment, psutil.Process()
    parts.federation = replace(parts.federation, engine=Disturbed(parts.engine))
    with samples.open("a") as file, no_page():
        for result in run.rounds():
            memory = this.memory_info().rss
            file.write(f"{process} {result.round} {memory} {this.num_fds()}\n")
            file.flush()


def lines(out: Path) -> list[str]:
    """The whole lines of rounds.jsonl."""
    if not out.exists():
        return []
    return (out / "rounds.jsonl").read_text().rpartition("\n")[0].splitlines()


def slope(series: Mapping[int, list[tuple[int, float]]]) -> float:
    """Least squares: how much y grows with x, with a height of its own for each series."""
    above = below = 0.0
    for points in series.values():
        x0 = sum(x for x, _ in points) / len(points)
        y0 = sum(y for _, y in points) / len(points)
        above += sum((x - x0) * (y - y0) for x, y in points)
        below += sum((x - x0) ** 2 for x, _ in points)
    return above / below


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(getattr(request, "param", ROUNDS))


@pytest.fixture
def config(tmp_path: Path, rounds: int) -> Path:
    (tmp_path / "site").mkdir()
    made = make_site(tmp_path / "site")
    write_rows(tmp_path / "site" / "train.csv", 6 * CLIENTS)
    settings = {
        "clients = 5": f"clients = {CLIENTS}",
        "rounds = 4": f"rounds = {rounds}",
        "local_steps = 2": "local_steps = 1",
        "participation = 0.6": "participation = 1.0\nbank = 50\ncache = ''",
        "every = 2": "every = 50",
        'scheme = "dirichlet"': 'scheme = "iid"',
        "min_examples = 2\n": "",
    }
    text = made.read_text()
    for old, new in settings.items():
        assert old in text
        text = text.replace(old, new)
    made.write_text(text)
    return made


def test_a_thousand_rounds_with_kills_lose_no_committed_round_and_no_memory(
    config: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    rng, started = random.Random(SEED), time.monotonic()
    out, samples, said = (tmp_path / name for name in ("soak/run", "samples", "said.txt"))
    out.parent.mkdir()
    kills = [rng.randint(1, FURTHEST) for _ in range(KILLS)]
    kept: list[str] = []
    happened = []
    for process, kill in enumerate([*kills, NEVER]):
        code = in_child(lambda k=kill, p=process: go_on(config, out, samples, k, p), said)  # type: ignore[misc]
        assert code in (0, -9), said.read_text()
        now = lines(out)
        assert now[: len(kept)] == kept, "a committed round was lost"
        kept = now
        if code == -9:
            happened.append(len(now) - 1)
        print(
            f"process {process} ended with {code} after round {len(now) - 1}, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
    assert code == 0
    assert len(happened) == KILLS
    records = [json.loads(line) for line in kept]
    assert [record["round"] for record in records] == list(range(ROUNDS + 1))
    assert left_over(out) == []
    counted = dict.fromkeys(WRONG, 0)
    for record in records[1:]:
        drawn = {client: befalls(record["round"], client) for client in record["cohort"]}
        wrong = {client: what for client, what in drawn.items() if what}
        away = {client for client, what in wrong.items() if what == "away"}
        assert record["rejected"].keys() == wrong.keys() - away
        unused = record["rejected"] | record.get("missing", {})
        assert unused.keys() == wrong.keys()
        for client, what in wrong.items():
            counted[what] += 1
            assert SAID[what] in unused[client]
    memory: dict[int, list[tuple[int, float]]] = {}
    files: dict[int, set[int]] = {}
    begun: dict[int, int] = {}
    for line in samples.read_text().splitlines():
        process, round, size, handles = map(int, line.split())
        first = begun.setdefault(process, round)
        if round >= first + WARM:
            memory.setdefault(process, []).append((round, size / 1e6))
            files.setdefault(process, set()).add(handles)
    growth = 100 * slope(memory)
    print(f"memory: {growth:+.3f} MB per 100 rounds; open files: {files}", flush=True)
    assert growth < MOST_GROWTH
    assert all(len(counts) == 1 for counts in files.values())
    record = Record(
        "soak",
        "Soak",
        ABOUT,
        "make soak",
        ["what", "figure"],
        seed=SEED,
        wanted=pytestconfig.getoption("record"),
    )
    record.add(["clients, rounds", f"{CLIENTS}, {ROUNDS}"])
    record.add(["updates that did not come", f"{counted['away']:,}"])
    record.add(["updates of the round before", f"{counted['stale']:,}"])
    record.add(["updates with NaN", f"{counted['NaN']:,}"])
    record.add(["updates of a wrong shape", f"{counted['shape']:,}"])
    record.add(["killed after rounds", ", ".join(map(str, happened))])
    record.add(["committed rounds lost", "0"])
    record.add(["memory, MB per 100 rounds", f"{growth:+.2f}"])
    record.add(["open files", "constant"])
    record.write()
    assert os.environ.get("OMP_NUM_THREADS") == "1", "these figures are of one thread"


@pytest.mark.parametrize("rounds", [40], indirect=True)
def test_a_run_with_kills_ends_as_one_without(config: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name / "run" for name in ("killed", "whole")]
    samples, said = tmp_path / "samples", tmp_path / "said.txt"
    for out in outs:
        out.parent.mkdir()
    for kill in (100, 150, 200):
        code = in_child(lambda k=kill: go_on(config, outs[0], samples, k, 0), said)  # type: ignore[misc]
        assert code == -9, said.read_text()
    for out in outs:
        code = in_child(lambda o=out: go_on(config, o, samples, NEVER, 0), said)  # type: ignore[misc]
        assert code == 0, said.read_text()
    assert left_by(outs[0]) == left_by(outs[1])
