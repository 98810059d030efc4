"""rolora itself, through its public functions: one run folder a request.

Timed: ``run.rounds()`` as anyone calls it: cohorts, batches cut and padded, local training, checks,
aggregation error, ledger of traffic, checkpoint and record on disk, the configured evaluations, and
at the end the adapter and the report. Not timed: reading and tokenising rows and loading the base,
and the evaluation before the first round (no peer does one).

    python -m benchmarks.peers.rolora_run JOB_FOLDER BANK [KEY=VALUE ...] [ADAPTER_FILE]
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

import rolora
from benchmarks.party import Answer, serve
from benchmarks.processes import anonymous_kib
from rolora.config.load import make_config
from rolora.run.experiment import Experiment

if __name__ == "__main__":
    folder, bank, *more = sys.argv[1:]
    changes, rest = [w for w in more if "=" in w], [w for w in more if "=" not in w]
    job = json.loads((Path(folder) / "job.json").read_text())
    config = make_config(
        json.loads((Path(folder) / "config.json").read_text()), [f"train.bank={bank}", *changes]
    )
    # as in any run, each of several processes has one thread
    torch.set_num_threads(job["threads"] if config.train.workers == 1 else 1)
    place = Path(tempfile.mkdtemp())
    base = rolora.start(config, place / "first").experiment.base
    waiting: list[Iterator[rolora.RoundResult]] = []

    def prepare() -> None:
        shutil.rmtree(place)
        rounds = rolora.start(config, place / "run", partial(Experiment, base=base)).rounds()
        next(rounds)  # round 0: the evaluation before training
        waiting[:] = [rounds]

    def run() -> Answer:
        started = time.perf_counter()
        curve, units = [], 0.0
        for _, result in zip(range(len(job["rounds"])), waiting[0], strict=False):
            units += sum(client["steps"] for client in result.clients.values())
            if result.metrics:
                curve.append((time.perf_counter() - started, result.metrics["accuracy"]))
            last = result.state.server.adapter
        if not config.train.rounds > len(job["rounds"]):
            list(waiting[0])  # the adapter and the report are written
        if rest and rest != ["held"]:
            save_file(dict(last), rest[0])
        return {"units": units, "curve": curve}

    def after() -> Answer:
        """Anonymous KiB held once what is free has been given back, if "held" was asked for."""
        if rest != ["held"]:
            return {}
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return {"held_kib": anonymous_kib(os.getpid())}

    serve(run, prepare, after)
    shutil.rmtree(place)
