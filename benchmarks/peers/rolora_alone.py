"""The training of a federation's sites and nothing else: a process a site, no network, no server.

Timed: rounds in which every process trains its site's share at the same moment, from the same
adapter; a round ends when the slowest is done. No federation of these sites on this machine can
take less.

    python -m benchmarks.peers.rolora_alone FEDERATION ROUNDS
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.party import Answer, serve
from rolora.algorithm.adapter import Assignment, ClientInfo
from rolora.config.load import load_config
from rolora.run.experiment import Experiment
from rolora.training.engine import Job


def trainer(file: Path, name: str, orders: Connection) -> None:
    """Train this site's share of the round whose number comes, for ever."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(load_config(file), Path(folder))
        run, server = experiment.federation, experiment.start.server
        orders.send(None)
        while number := orders.recv():
            rank = experiment.config.lora.ranks([name])[name]
            info = ClientInfo(name, run.engine.clients()[name], rank, number)
            assigned = Assignment(info, server.adapter)
            job = Job(replace(server, round=number - 1), (assigned,), run.seed, run.lr(number))
            orders.send([update.client for update in run.engine.run(run.method, job)])


def main(federation: str, rounds: str) -> None:
    """Start a process for each site's folder, and answer."""
    file, fresh = Path(federation) / "run.toml", multiprocessing.get_context("spawn")
    orders = []
    for site in sorted((Path(federation) / "sites").iterdir()):
        here, there = fresh.Pipe()
        fresh.Process(target=trainer, args=(file, site.name, there), daemon=True).start()
        orders.append(here)
    for one in orders:
        one.recv()

    def run() -> Answer:
        found = []
        for number in range(1, int(rounds) + 1):
            started = time.perf_counter()
            for one in orders:
                one.send(number)
            for one in orders:
                one.recv()
            found.append({"seconds": time.perf_counter() - started})
        return {"units": int(rounds), "rounds": found}

    serve(run)
    for one in orders:
        one.send(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
