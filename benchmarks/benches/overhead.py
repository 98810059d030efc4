"""What a federation costs on top of the bare training in it: 50 clients, 1 and 10 local steps.

Two rounds, so that each factor is trained once; every row has the same number of tokens, so that no
party pads. eta = time of the raw loop / time of the party: 1 means the federation is free, more
means that it trains faster than one client after another can.
"""

from __future__ import annotations

from benchmarks.job import configuration, lengthened, write_job
from benchmarks.place import Place

# name, local steps, tokens a row (4 rows a client step), with every peer or only the raw loop
SETTINGS = (
    ("overhead-1x64", 1, 16, True),
    ("overhead-10x64", 10, 16, True),
    ("overhead-1x128", 1, 32, False),
)


def run(place: Place) -> None:
    """Measure each setting; at least 9 interleaved repetitions with the raw loop."""
    for name, steps, tokens, everyone in SETTINGS:
        if not place.quick or name == "overhead-1x64":
            measure(place, name, steps, tokens, everyone)


def measure(place: Place, name: str, steps: int, tokens: int, everyone: bool) -> None:
    """One setting: the job, its parties, the record."""
    clients, batch_size = (10 if place.quick else 50), 4
    train, _ = place.questions()
    rows = lengthened(train, place.scratch / f"{name}.csv", tokens // 4, 20 * clients)
    few = lengthened(train, place.scratch / f"{name}-test.csv", tokens // 4, 64)
    config = configuration(
        place.model(),
        rows,
        few,
        max_length=tokens,
        clients=clients,
        rounds=1000,  # never reached: no last evaluation, no report
        local_steps=steps,
        batch_size=batch_size,
        eval={"every": 1000},
    )
    folder = place.scratch / name
    write_job(config, folder, 2, threads=place.threads, actors=place.cores)
    parties = [
        place.party("raw_loop", folder),
        place.party("rolora_run", folder, "auto", folder / "ours.safetensors", name="rolora"),
        place.party("rolora_run", folder, 1, name="rolora, one by one"),
    ]
    if everyone:
        parties += [
            place.party("peft_swap", folder, every=3),
            place.party("pfl_research", folder, every=3),
            place.party("trainer", folder, 5, every=3),
            place.party("flower", folder, every=3),
        ]
    place.measured(
        name, parties, 9, clients=clients, steps=steps, tokens=tokens * batch_size, rounds=2
    )
