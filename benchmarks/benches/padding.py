"""Short texts of uneven length: packed tokens against rows padded to the longest of the pass."""

from __future__ import annotations

import torch

from benchmarks.job import configuration
from benchmarks.place import Place
from rolora.config.schema import RunConfig
from rolora.run.experiment import Experiment
from rolora.training.engine import InProcess
from rolora.training.local import Work as ClientWork
from rolora.training.local import batches

CLIENTS, ROWS, STEPS = 16, 8, 2


def run(place: Place) -> None:
    """Both ways in turns; the record says how many tokens each computes."""
    train, test = place.questions()
    config = configuration(
        place.model(),
        train,
        test,
        max_length=128,
        clients=CLIENTS,
        rounds=2,
        local_steps=STEPS,
        batch_size=ROWS,
    )
    folder = place.job(config, "padding", 2)
    parties = [
        place.party("rolora_step", folder, "padded", name="padded"),
        place.party("rolora_step", folder, "packed", name="packed"),
    ]
    place.measured("padding", parties, 9, ideal=ideal(config), clients=CLIENTS, rows=ROWS)


def ideal(config: RunConfig) -> float:
    """Tokens computed with padding over tokens that are there, over the same passes."""
    experiment = Experiment(config, config.root)
    engine = experiment.federation.engine
    assert isinstance(engine, InProcess)
    padded = real = 0
    for round in (1, 2):
        work = [
            ClientWork(c, rows, experiment.start.server.adapter, STEPS)
            for c, rows in engine.shards.items()
        ]
        streams = [batches(one, ROWS, 0, round) for one in work]
        for _ in range(STEPS):
            lengths = engine.examples.lengths[torch.cat([next(stream) for stream in streams])]
            padded += len(lengths) * int(lengths.max())
            real += int(lengths.sum())
    return padded / real
