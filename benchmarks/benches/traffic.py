"""Bytes up and down, as the run counts them, against elements × width; nothing here is timed.

All clients take part in every round, so from the second round on each holds what it received
before, and only what changed travels. The safetensors column is the file that an update would be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from safetensors.torch import save

import rolora
from benchmarks import harness
from benchmarks.job import configuration
from benchmarks.place import Place
from rolora.algorithm.adapter import role_of
from rolora.files import write_file
from rolora.methods import get_method
from rolora.run.experiment import Experiment
from rolora.run.runs import Run

METHODS = ("rolora", "ffa_lora", "fedit")
CLIENTS, ROUNDS = 4, 4


def run(place: Place) -> None:
    """Four rounds of each method on four clients."""
    train, test = place.questions()
    base, rows = None, []
    for name in METHODS:
        config = configuration(
            place.model(),
            train,
            test,
            max_length=20,
            clients=CLIENTS,
            rounds=ROUNDS + 1,
            local_steps=1,
            batch_size=2,
            eval={"every": 1000},
            method={"name": name},
        )
        started = rolora.start(
            config, place.scratch / f"traffic-{name}", partial(Experiment, base=base)
        )
        base = started.experiment.base
        for _, result in zip(range(ROUNDS + 1), started.rounds(), strict=False):
            if result.round:
                rows.append(counted(started, name, result))
    record = {
        "bench": "traffic",
        "setting": {"clients": CLIENTS, "rank": 4, "quick": place.quick},
        "machine": {**harness.machine(), "versions": dict(place.versions)},
        "rows": rows,
    }
    write_file(place.records / "traffic.json", json.dumps(record, indent=1) + "\n")


def counted(run: Run, name: str, result: rolora.RoundResult) -> Mapping[str, Any]:
    """Bytes of one round, per client: counted, expected, and as a safetensors file."""
    shared = get_method(name).shared(result.round)
    elements = sum(
        math.prod(spec.shape) for spec in run.experiment.base.specs.tensors if spec.role in shared
    )
    sent = {n: t for n, t in result.state.server.adapter.items() if role_of(n) in shared}
    return {
        "method": name,
        "round": result.round,
        "up": result.bytes_up / CLIENTS,
        "up_expected": 4 * elements,
        "down": result.bytes_down / CLIENTS,
        "safetensors": len(save(sent)),
    }
