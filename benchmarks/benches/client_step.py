"""A client step in the bank against what no training with a frozen base can undercut.

All rows of a setting have the same number of tokens, so nobody pads. The limit is one forward pass
and one gradient at the embeddings, over all clients' rows at once; the raw loop is PEFT training,
one client after another.
"""

from __future__ import annotations

from benchmarks.job import configuration, lengthened
from benchmarks.place import Place

# tokens a client step, rows of it, clients at once (what train.bank = "auto" takes)
SETTINGS = ((64, 4, 16), (128, 4, 8), (256, 8, 4), (1024, 16, 1))


def run(place: Place) -> None:
    """Each size by itself, 9 repetitions."""
    train, _ = place.questions()
    for tokens, rows, clients in SETTINGS[:1] if place.quick else SETTINGS:
        length = tokens // rows
        texts = lengthened(
            train, place.scratch / f"step-{tokens}.csv", length // 4, 2 * rows * clients
        )
        few = lengthened(train, place.scratch / f"step-{tokens}-test.csv", length // 4, 32)
        config = configuration(
            place.model(),
            texts,
            few,
            max_length=length,
            clients=clients,
            rounds=2,
            local_steps=1,
            batch_size=rows,
        )
        folder = place.job(config, f"step-{tokens}", 2)
        parties = [
            place.party("limit", folder),
            place.party("rolora_step", folder, "packed", name="rolora"),
            place.party("raw_loop", folder),
        ]
        place.measured(
            f"client-step-{tokens}", parties, 9, clients=clients, tokens=tokens, rows=rows
        )
