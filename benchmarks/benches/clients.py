"""Time per client step and memory from 10 to 1,000 clients, when ten of them train in a round.

The work of a round is the same in all sizes, so both should stay where they are. Memory is that of
the process tree (RssAnon): its peak while rounds run, and what is held after them once the
allocator has given back what is free.
"""

from __future__ import annotations

from benchmarks.job import configuration, lengthened
from benchmarks.place import Place

COHORT, ROUNDS, LENGTH = 10, 4, 20


def run(place: Place) -> None:
    """One party a size, in turns."""
    train, _ = place.questions()
    few = lengthened(train, place.scratch / "clients-test.csv", 1, 64)
    sizes = (10, 100) if place.quick else (10, 100, 1000)
    # two full batches a client and rows of one length, so that a step is the same work everywhere
    rows = lengthened(train, place.scratch / "clients.csv", LENGTH // 4, 8 * max(sizes))
    parties = []
    for clients in sizes:
        config = configuration(
            place.model(),
            rows,
            few,
            max_length=LENGTH,
            clients=clients,
            rounds=1000,
            participation=COHORT / clients,
            local_steps=2,
            batch_size=4,
            eval={"every": 1000},
        )
        folder = place.job(config, f"clients-{clients}", ROUNDS)
        parties.append(place.party("rolora_run", folder, "auto", "held", name=f"{clients} clients"))
    place.measured("clients", parties, 5, cohort=COHORT, rounds=ROUNDS, steps=2, batch_size=4)
