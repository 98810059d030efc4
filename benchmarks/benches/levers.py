"""All levers on one short-text job: bank, packing and the prefix cache, beside two PEFT loops.

The first PEFT loop is as its documentation has it: adapters in every layer, batches padded to their
longest row, one client after another. The second is given rolora's layers too. All train the same
rows in the same order, and the accuracy at the end is in the record.
"""

from __future__ import annotations

from benchmarks.job import configuration
from benchmarks.place import Place

TOP = 2  # a third of MiniLM's 6 layers


def run(place: Place) -> None:
    """Whole runs, three repetitions."""
    clients, rounds = (10, 2) if place.quick else (50, 4)
    train, test = place.questions()
    folders = {}
    for layers in ("all", f"top:{TOP}"):
        config = configuration(
            place.model(),
            train,
            test,
            max_length=64,
            clients=clients,
            layers=layers,
            rounds=1000,  # the peers write no report either
            local_steps=2,
            batch_size=4,
            eval={"every": rounds},
            cache=str(place.scratch / "cache"),
            lr=1e-2,
        )
        folders[layers] = place.job(config, f"levers-{layers.replace(':', '')}", rounds)
    few = folders[f"top:{TOP}"]
    parties = [
        place.party("rolora_run", few, "auto", name="rolora"),
        place.party("peft_swap", folders["all"], name="PEFT loop, every layer"),
        place.party("peft_swap", few, name="PEFT loop, same layers"),
    ]
    place.measured("levers", parties, 3, clients=clients, rounds=rounds, steps=2, apart={})
