"""A whole run of small clients, as a user with the whole machine would have each party do it.

rolora has a process for each core, with one group of clients each, and chooses its dtype; the PEFT
loop has as many threads, Flower on Ray an actor for each core. Both are run in float32 and in
bfloat16: the faster one is to be compared with. Every party trains the same rows in the same
batches from the same start with the same optimiser, and measures the accuracy after the last round.

Then adapters in the top third of the layers, against the PEFT loop as its documentation has it
(adapters in every layer), and given the same layers. rolora reads what enters these layers from
disk; it was computed while rolora got ready.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.harness import Party
from benchmarks.job import configuration, write_job
from benchmarks.place import Place

PEERS = {"PEFT loop": "peft_swap", "Flower on Ray": "flower"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
ROUNDS, TOP = 4, 2  # a third of MiniLM's 6 layers


def clients(place: Place) -> int:
    """All of them take part in every round."""
    return 10 if place.quick else 50


def run(place: Place) -> None:
    """Every layer, and compare what the parties ended with; then the top third."""
    short: dict[str, Any] = {"max_length": 20, "local_steps": 5, "batch_size": 2}
    jobs = written(place, "whole", **short)
    ours, start = (jobs["float32"] / f"{name}.safetensors" for name in ("rolora", "start"))
    theirs = {
        f"{name}, {dtype}": (module, folder, folder / f"{module}.safetensors")
        for name, module in PEERS.items()
        for dtype, folder in jobs.items()
    }
    place.measured(
        "whole-job",
        [
            rolora(place, jobs["float32"]),
            *(place.party(*words, name=name) for name, words in theirs.items()),
        ],
        3,
        check=lambda: {
            "apart": {name: apart(words[-1], ours, start) for name, words in theirs.items()}
        },
        threads=place.cores,
        **short,
    )
    long: dict[str, Any] = {"max_length": 64, "local_steps": 2, "batch_size": 4, "lr": 1e-2}
    folders = {
        layers: written(place, f"whole-{name}", layers=name, **long)
        for layers, name in {"every layer": "all", "same layers": f"top:{TOP}"}.items()
    }
    loops = [
        place.party("peft_swap", folder, name=f"PEFT loop, {layers}, {dtype}")
        for layers, jobs in folders.items()
        for dtype, folder in jobs.items()
    ]
    few = rolora(place, folders["same layers"]["float32"])
    place.measured("whole-job-top", [few, *loops], 3, apart={}, threads=place.cores, **long)


def written(place: Place, name: str, **settings: Any) -> dict[str, Path]:
    """dtype -> the folder of the job on every core."""
    train, test = place.questions()
    folders = {}
    for dtype, short in DTYPES.items():
        config = configuration(
            place.model(),
            train,
            test,
            clients=clients(place),
            dtype=short,
            rounds=1000,  # the peers write no report either
            eval={"every": ROUNDS},
            cache=str(place.scratch / "cache"),
            **settings,
        )
        folders[dtype] = write_job(
            config,
            place.scratch / f"{name.replace(':', '')}-{short}",
            ROUNDS,
            threads=place.cores,
            actors=place.cores,
        )
    return folders


def rolora(place: Place, folder: Path) -> Party:
    """A run with a process and a group for each core, in the dtype that is faster here."""
    bank = -(-clients(place) // place.cores)
    whole = (f"train.workers={place.cores}", "model.dtype=auto")
    return place.party(
        "rolora_run", folder, bank, *whole, folder / "rolora.safetensors", name="rolora"
    )


def apart(theirs: Path, ours: Path, start: Path) -> float | None:
    """‖theirs − ours‖ / ‖ours − start‖ of adapter files; None if a party left none."""
    if not (theirs.exists() and ours.exists()):
        return None
    a, b, origin = (load_file(path) for path in (theirs, ours, start))
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    moved = sum(float((b[name] - origin[name]).double().square().sum()) for name in b)
    return float((difference / moved) ** 0.5)
