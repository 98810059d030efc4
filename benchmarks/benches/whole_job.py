"""A whole run of 50 small clients in every party that can express it, and the same adapter at last.

Every party has the whole machine, trains the same rows in the same batches from the same start with
the same optimiser, and measures the accuracy after the last round; local steps and the rounds
between evaluations are rolora's defaults. The record keeps how far the final adapters lie
apart: ‖theirs − ours‖ / ‖ours − start‖, over all tensors.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from benchmarks.job import configuration, write_job
from benchmarks.place import Place

PARTIES = ("rolora_run", "peft_swap", "flower")


def run(place: Place) -> None:
    """Measure, and compare the adapters that the parties ended with."""
    clients, rounds, steps = (10, 2, 2) if place.quick else (50, 5, 5)
    train, test = place.questions()
    config = configuration(
        place.model(),
        train,
        test,
        max_length=20,
        clients=clients,
        rounds=1000,  # the peers write no report either
        local_steps=steps,
        batch_size=2,
        eval={"every": rounds},
    )
    folder = write_job(
        config, place.scratch / "whole", rounds, threads=place.cores, actors=place.cores
    )
    adapters = {name: folder / f"{name}.safetensors" for name in PARTIES}
    parties = [
        place.party("rolora_run", folder, "auto", adapters["rolora_run"], name="rolora"),
        *(place.party(name, folder, adapters[name]) for name in PARTIES[1:]),
    ]
    setting = {
        "clients": clients,
        "rounds": rounds,
        "steps": steps,
        "batch_size": 2,
        "max_length": 20,
        "threads": place.cores,
    }
    place.measured(
        "whole-job",
        parties,
        3,
        check=lambda: {
            "apart": {
                name: apart(adapters[name], adapters["rolora_run"], folder / "start.safetensors")
                for name in PARTIES[1:]
            }
        },
        **setting,
    )


def apart(theirs: Path, ours: Path, start: Path) -> float | None:
    """‖theirs − ours‖ / ‖ours − start‖ of adapter files; None if a party left none."""
    if not (theirs.exists() and ours.exists()):
        return None
    a, b, origin = (load_file(path) for path in (theirs, ours, start))
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    moved = sum(float((b[name] - origin[name]).double().square().sum()) for name in b)
    return float((difference / moved) ** 0.5)
