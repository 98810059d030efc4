"""A client step on a base in bfloat16 against float32, with attention in either where it counts.

Then what the operators of a step take in both.
"""

from __future__ import annotations

from benchmarks.job import configuration, lengthened
from benchmarks.place import Place

CLIENTS, ROWS, LENGTH = 8, 4, 32


def run(place: Place) -> None:
    """All ways in turns, 9 repetitions."""
    train, _ = place.questions()
    texts = lengthened(train, place.scratch / "dtype.csv", LENGTH // 4, 2 * ROWS * CLIENTS)
    few = lengthened(train, place.scratch / "dtype-test.csv", LENGTH // 4, 32)
    folders = {}
    for dtype in ("fp32", "bf16"):
        config = configuration(
            place.model(),
            texts,
            few,
            max_length=LENGTH,
            clients=CLIENTS,
            dtype=dtype,
            rounds=2,
            local_steps=1,
            batch_size=ROWS,
        )
        folders[dtype] = place.job(config, f"dtype-{dtype}", 2)
    parties = [
        place.party("rolora_step", folders["fp32"], "packed", name="float32"),
        place.party("rolora_step", folders["bf16"], "packed", name="bfloat16"),
        place.party("rolora_step", folders["bf16"], "lowest", name="bfloat16, attention too"),
    ]
    place.measured("bfloat16", parties, 9, clients=CLIENTS, rows=ROWS, tokens=ROWS * LENGTH)
    profiles = [
        place.party("rolora_step", folders["fp32"], "profiled", name="float32"),
        place.party("rolora_step", folders["bf16"], "profiled", name="bfloat16"),
    ]
    place.measured("operators", profiles, 3, clients=CLIENTS, rows=ROWS, tokens=ROWS * LENGTH)
