"""What a federation costs on top of the bare training in it, with 1 and with 10 local steps.

Two rounds, so that each factor is trained once; every row has the same number of tokens, so that no
party pads. eta = time of the raw loop / time of the party: 1 means the federation is free, more
means that it trains faster than one client after another can.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.job import configuration, lengthened
from benchmarks.place import Place

# name, clients, local steps, tokens a row (4 rows a client step), parties beside two
EVERY_PEER = ("one by one", "peft_swap", "pfl_research", "trainer", "flower")
SETTINGS = (
    ("overhead-1x64", 50, 1, 16, EVERY_PEER),
    ("overhead-10x64", 6, 10, 16, ("one by one", "peft_swap")),
    ("overhead-1x128", 50, 1, 32, ("one by one",)),
)


def run(place: Place) -> None:
    """Measure each setting; at least 9 interleaved repetitions with the raw loop."""
    for name, clients, steps, tokens, peers in SETTINGS:
        if not place.quick or name == "overhead-1x64":
            measure(place, name, 10 if place.quick else clients, steps, tokens, peers)


def measure(
    place: Place, name: str, clients: int, steps: int, tokens: int, peers: Sequence[str]
) -> None:
    """One setting: the job, its parties, the record."""
    batch_size = 4
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
    folder = place.job(config, name, 2)
    parties = [
        place.party("raw_loop", folder),
        place.party("rolora_run", folder, "auto", folder / "ours.safetensors", name="rolora"),
    ]
    for peer in peers:
        if peer == "one by one":
            parties.append(place.party("rolora_run", folder, 1, name="rolora, one by one"))
        elif peer == "trainer":
            parties.append(place.party(peer, folder, 5, every=3))
        else:
            parties.append(place.party(peer, folder, every=3))
    place.measured(
        name, parties, 9, clients=clients, steps=steps, tokens=tokens * batch_size, rounds=2
    )
