"""Twenty rounds across real processes in which everything is killed; nothing committed is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from loopback import NAMES, Command, Loopback, adapter, federation, here, make_place, rounds, until

ROUNDS = 20
RUN = "soak"
SITE_KILLED = range(4, ROUNDS + 1, 4)  # while it answers the question of this round
SUPERLINK_KILLED = (6, 14)
COORDINATOR_KILLED = 10


def asked(fed: Loopback, round: int, name: str) -> None:
    """Wait until the round before is committed and this site is at work on this one."""
    fed.reached(RUN, round - 1)
    until(lambda: fed.answering(name), what=f"{name} to be asked in round {round}")


def kill_site(fed: Loopback, round: int) -> None:
    name = NAMES[round // 4 % len(NAMES)]
    asked(fed, round, name)
    fed.leave(name, number=signal.SIGKILL)
    assert fed.answering(name), "it was killed before it could answer"
    fed.join(name)


def kill_superlink(fed: Loopback, run: Command, round: int) -> Command:
    asked(fed, round, "ann")
    fed.kill_superlink()
    return fed.serve_again(run, RUN, round)


def kill_coordinator(fed: Loopback, run: Command, round: int) -> Command:
    asked(fed, round, "ann")
    os.kill(fed.coordinator(RUN), signal.SIGKILL)
    assert run.ended() == 1, run.output()
    return fed.run(RUN, resume=True)


@pytest.mark.soak
def test_twenty_rounds_with_kills_lose_no_committed_round_and_end_with_the_undisturbed_adapter(
    tmp_path: Path,
) -> None:
    config = make_place(tmp_path)
    started, out = time.monotonic(), tmp_path / RUN
    kept: list[dict[str, object]] = []
    with federation(tmp_path / "fed", config, f"train.rounds={ROUNDS}") as fed:
        fed.join(*NAMES)
        run = fed.run(RUN, "aggregate.quorum=3")
        for round in range(1, ROUNDS + 1):
            if round in SITE_KILLED:
                kill_site(fed, round)
            elif round in SUPERLINK_KILLED:
                run = kill_superlink(fed, run, round)
            elif round == COORDINATOR_KILLED:
                run = kill_coordinator(fed, run, round)
            fed.reached(RUN, round)
            now = rounds(out)
            assert now[: len(kept)] == kept, f"a committed round was lost by round {round}"
            kept = now
            print(f"round {round}: {time.monotonic() - started:.0f} s", flush=True)
        assert run.ended() == 0, run.output()
        undisturbed = here(fed.folder / "run.toml", tmp_path / "here")
    lines = rounds(out)
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    assert all(line["attempt"] == 0 for line in lines)
    assert all(sorted(line["clients"]) == list(NAMES) for line in lines[1:])
    assert adapter(out) == undisturbed
