"""Adapters in the top layers only: the layers below read from disk against run in every step.

The ideal is (L + k) / 2k for adapters in the top k of L layers: all layers forward and k backward
against k forward and k backward.
"""

from __future__ import annotations

from benchmarks.job import configuration, lengthened
from benchmarks.place import Place

CLIENTS, ROWS, LENGTH, LAYERS = 16, 4, 16, 6


def run(place: Place) -> None:
    """MiniLM's top 2 and top 3 of 6 layers."""
    train, _ = place.questions()
    texts = lengthened(train, place.scratch / "prefix.csv", LENGTH // 4, 8 * ROWS * CLIENTS)
    few = lengthened(train, place.scratch / "prefix-test.csv", LENGTH // 4, 32)
    for top in (2,) if place.quick else (2, 3):
        config = configuration(
            place.model(),
            texts,
            few,
            max_length=LENGTH,
            clients=CLIENTS,
            layers=f"top:{top}",
            rounds=2,
            local_steps=4,
            batch_size=ROWS,
        )
        folder = place.job(config, f"prefix-{top}", 2)
        parties = [
            place.party("rolora_step", folder, "packed", name="every layer"),
            place.party("rolora_step", folder, "cached", name="cached below"),
        ]
        ideal = (LAYERS + top) / (2 * top)
        place.measured(f"prefix-cache-{top}", parties, 9, ideal=ideal, top=top, clients=CLIENTS)
