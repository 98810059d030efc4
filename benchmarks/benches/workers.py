"""Worker processes: a run in one process against the same run in two, with one thread each.

The ideal is the number of processes, where that many cores are free. Then both beside a neighbour
that keeps one core busy. Memory is that of the process tree (RssAnon): weights that are mapped from
the checkpoint are not in it.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from benchmarks.job import configuration, lengthened
from benchmarks.place import Place

CLIENTS, ROWS, LENGTH, ROUNDS = 16, 4, 64, 2


def run(place: Place) -> None:
    """Four groups of four clients a round."""
    train, _ = place.questions()
    texts = lengthened(train, place.scratch / "workers.csv", LENGTH // 4, 8 * ROWS * CLIENTS)
    few = lengthened(train, place.scratch / "workers-test.csv", LENGTH // 4, 256)
    config = configuration(
        place.model(),
        texts,
        few,
        max_length=LENGTH,
        clients=CLIENTS,
        rounds=1000,
        local_steps=4,
        batch_size=ROWS,
        eval={"every": 1000},
    )
    folder = place.job(config, "workers", ROUNDS)
    parties = [
        place.party("rolora_run", folder, 4, name="one process"),
        place.party("rolora_run", folder, 4, "train.workers=2", name="two workers"),
    ]
    place.measured("workers", parties, 5, clients=CLIENTS, rounds=ROUNDS, steps=4)
    with neighbour(place.ours):
        place.measured("workers-busy", parties, 5, clients=CLIENTS, rounds=ROUNDS, steps=4)


@contextlib.contextmanager
def neighbour(python: str) -> Iterator[None]:
    """Another process that computes without end."""
    with subprocess.Popen([python, "-c", "while True: pass"]) as busy:
        try:
            yield
        finally:
            busy.kill()
