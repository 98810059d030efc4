"""Time per client step and memory from 10 to 1,000 clients, when ten of them train in a round.

The work of a round is the same in all sizes, so both should stay where they are. Memory is that of
the process tree (RssAnon): its peak while rounds run, and what is held after them once the
allocator has given back what is free.
"""

from __future__ import annotations

from benchmarks.job import configuration, write_job
from benchmarks.place import Place

COHORT = 10


def run(place: Place) -> None:
    """One party a size, in turns."""
    train, test = place.questions()
    sizes = (10, 100) if place.quick else (10, 100, 1000)
    parties = []
    for clients in sizes:
        config = configuration(
            place.model(),
            train,
            test,
            max_length=20,
            clients=clients,
            rounds=1000,
            participation=COHORT / clients,
            local_steps=5,
            batch_size=4,
            eval={"every": 1000},
        )
        folder = write_job(
            config,
            place.scratch / f"clients-{clients}",
            4,
            threads=place.threads,
            actors=place.cores,
        )
        parties.append(place.party("rolora_run", folder, "auto", name=f"{clients} clients"))
    place.measured("clients", parties, 5, cohort=COHORT, rounds=4, steps=5, batch_size=4)
