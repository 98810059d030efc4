"""The measuring is right: order, ratios, processes, records."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Outcome, Party, Sample, measure, write_record
from benchmarks.processes import Watch
from benchmarks.statistics import interval, ratio, rotated
from benchmarks.tables import blocks

SERVER = """
import json, os, time
from benchmarks.party import serve
serve(lambda: (time.sleep({sleep}), {body})[1])
"""


def party(name: str, body: str = '{"units": 1}', sleep: float = 0.0, every: int = 1) -> Party:
    """A party that sleeps and answers."""
    return Party(name, (sys.executable, "-c", SERVER.format(body=body, sleep=sleep)), every)


ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent.parent)}


def test_the_order_is_rotated_so_that_every_party_is_first_as_often() -> None:
    orders = [rotated("ABC", repetition) for repetition in range(3)]
    assert orders == [["A", "B", "C"], ["B", "C", "A"], ["C", "A", "B"]]


def test_a_known_ratio_lies_in_nineteen_of_twenty_intervals() -> None:
    rng, inside = random.Random(1), 0
    for _ in range(100):
        pairs = []
        for _ in range(15):
            slow = rng.lognormvariate(0, 0.5)  # of the machine: both of the pair suffer it
            pairs.append((2.0 * slow * rng.lognormvariate(0, 0.1), slow))
        low, high = interval(pairs, draws=500)
        inside += low <= 2.0 <= high
    assert 88 <= inside <= 100


def test_what_slows_both_of_a_pair_does_not_widen_the_interval() -> None:
    pairs = [(3.0 * slow, slow) for slow in (1.0, 10.0, 100.0, 2.0, 50.0)]
    assert ratio(pairs) == pytest.approx(3.0)
    assert interval(pairs) == pytest.approx((3.0, 3.0))


def test_parties_take_turns_and_a_slow_one_takes_part_in_every_nth() -> None:
    parties = [party("quick"), party("slow", every=2)]
    outcomes = measure(parties, 4, ENVIRONMENT)
    assert [sample.repetition for sample in outcomes["quick"].samples] == [0, 1, 2, 3]
    assert [sample.repetition for sample in outcomes["slow"].samples] == [0, 2]
    assert all(outcome.first and outcome.cold_seconds > 0 for outcome in outcomes.values())


def test_a_party_that_breaks_is_named_with_its_last_words_and_the_others_go_on() -> None:
    broken = Party("broken", (sys.executable, "-c", "raise SystemExit('no such library')"))
    outcomes = measure([broken, party("good")], 1, ENVIRONMENT)
    assert outcomes["broken"].failed == "no such library"
    assert len(outcomes["good"].samples) == 1


def test_the_time_of_a_run_is_taken_outside_the_party() -> None:
    sample = measure([party("sleeper", sleep=0.2)], 1, ENVIRONMENT)["sleeper"].samples[0]
    assert sample.seconds >= 0.2
    assert sample.cpu_seconds < 0.15


def test_processor_time_and_memory_of_a_child_s_child_are_counted() -> None:
    import os
    import subprocess

    burn = "import time; x = b'x' * (40 << 20); t = time.process_time()\n"
    burn += "while time.process_time() - t < 0.6: pass\ntime.sleep(0.5)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    with Watch(os.getpid(), every=0.05) as watch:
        subprocess.run([sys.executable, "-c", nested], check=True)
    assert watch.cost.cpu_seconds >= 0.5
    assert watch.cost.peak_kib > 40 << 10


def outcome(seconds: float) -> Outcome:
    """Two samples of this many seconds."""
    samples = [Sample(i, seconds, seconds, 1, 0.5, {"units": 10}) for i in range(2)]
    return Outcome(1.0, samples[0], samples)


def test_a_record_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    machine = {"cpu": "x", "cores": 2, "python": "3", "versions": {}}
    setting = {"quick": True, "threads": 1}
    whole = write_record(tmp_path, "overhead", {"raw_loop": outcome(1.0)}, setting, machine)
    before = whole.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_record(tmp_path, "overhead", {"raw_loop": outcome(float("nan"))}, setting, machine)
    assert [path.name for path in tmp_path.iterdir()] == ["overhead.json"]
    assert whole.read_bytes() == before
    assert json.loads(before)["parties"]["raw_loop"]["samples"][0]["seconds"] == 1.0


def test_a_table_says_how_many_times_as_fast_a_party_is_and_which_failed(tmp_path: Path) -> None:
    machine = {"cpu": "x", "cores": 2, "python": "3", "versions": {}}
    outcomes = {
        "raw_loop": outcome(1.0),
        "twice": outcome(0.5),
        "gone": Outcome(failed="it is not there"),
    }
    write_record(tmp_path, "overhead", outcomes, {"quick": True, "threads": 1}, machine)
    table = blocks(tmp_path)["overhead"]
    assert "| twice | 50.00 | 50.00 | 2.00 | 2.00 to 2.00 | 2.00 | 2 |" in table
    assert "| gone | failed: it is not there |" in table
